"""torchmetrics' LPIPS network with a backbone from a file or from torchvision."""

from pathlib import Path

import torch
from torchmetrics.functional.image.lpips import _NoTrainLpips

from ..sockets import ConfigError
from ._weights import file_hash, module_hash, read_weights

NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def perceptual_network(net: str, backbone: str | Path | None) -> tuple[_NoTrainLpips, str]:
    """Return torchmetrics' LPIPS network with this backbone, and a hash of the backbone."""
    if backbone is None:
        try:
            network = _NoTrainLpips(net=net)  # type: ignore[arg-type]
        except OSError as error:  # URLError is one
            raise ConfigError(
                f"LPIPS: torchvision's weights of {NETS[net]} are not in its cache "
                f"({torch.hub.get_dir()}/checkpoints) and cannot be fetched: {error}; give the "
                "file: evaluation.lpips.backbone=PATH"
            ) from error
        return network, module_hash(network.net)
    weights = read_weights(backbone)
    network = _NoTrainLpips(net=net, pnet_rand=True)  # type: ignore[arg-type]
    state = network.net.state_dict()
    for name in state:
        # slices.2.5.weight or slice3.5.weight here, features.5.weight in torchvision
        source = name.split(".", 2)[2] if name.startswith("slices.") else name.split(".", 1)[1]
        found = weights.get(f"features.{source}", weights.get(source))
        if found is None or found.shape != state[name].shape:
            told = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            raise ConfigError(
                f"LPIPS: {str(backbone)!r} is no {NETS[net]} of torchvision: features.{source} of "
                f"shape {tuple(state[name].shape)} is needed, the file {told}"
            )
        state[name] = found
    network.net.load_state_dict(state)
    return network, file_hash(backbone)
