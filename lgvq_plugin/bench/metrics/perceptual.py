"""LPIPS v0.1 by torchmetrics, with a backbone from a file, so that no download is needed.

And CLIP score, 100 times the cosine of an image's and a text's CLIP features, 0 if negative:
written here because torchmetrics' version (1.9) fails with transformers 5.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image.lpips import _NoTrainLpips

from ...checkpoints.read import read_raw
from ...sockets import ConfigError, suggest
from .reconstruction import eight_bit, to_uint8

BATCH = 32  # of CLIP
NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class PerceptualDistance(Metric):
    """Mean LPIPS over all images, on 8-bit values.

    Args:
        net: alex (reported by papers), vgg (trained on by VQGANs) or squeeze.
        backbone: file with torchvision's weights of that net (`features.…`); None: torchvision's
            cache or download.

    Raises:
        ConfigError: for an unknown net, a file that does not fit, or a failed download.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, net: str = "alex", backbone: str | Path | None = None) -> None:
        super().__init__()
        if net not in NETS:
            raise ConfigError(f"LPIPS: no net {net!r}{suggest(net, NETS)}")
        self.net = net
        self.network, self.weights_hash = perceptual_network(net, backbone)
        for name in ("total", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the number depends on, besides the images."""
        fixed = {"heads": "LPIPS v0.1", "resize": "none", "quantization": "uint8"}
        implementation = f"torchmetrics {torchmetrics.__version__}"
        return {"implementation": implementation, "weights": self.weights_hash, **fixed}

    @torch.no_grad()
    def distances(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distance of each pair, (B,) float32; both (B, 3, H, W) in [-1, 1]."""
        wanted, given = eight_bit(images) * 2 - 1, eight_bit(reconstructions) * 2 - 1
        return self.network(given, wanted).reshape(-1)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch."""
        distances = self.distances(images, reconstructions).double()
        self.total += distances.sum()
        self.count += len(distances)

    def compute(self) -> dict[str, Tensor]:
        """Return `lpips_<net>`; nan without images."""
        return {f"lpips_{self.net}": self.total / self.count}


class CLIPScorer:
    """Score how well texts describe images, with a CLIP model of transformers.

    `model` is a folder with its weights, or a name on the hub.

    Raises:
        ConfigError: if transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        try:
            import transformers

            self._network = transformers.CLIPModel.from_pretrained(model).float().eval()
            self._processor = transformers.CLIPProcessor.from_pretrained(model)
        except ImportError as error:
            raise ConfigError(f"CLIP score: {error}; pip install 'lgvq_plugin[hf]'") from error
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"evaluation.clip_score: no CLIP model at {model!r} "
                f"({str(error).splitlines()[0]}); expected a folder with weights of transformers, "
                "or a name on the hub"
            ) from error
        self.settings = {"implementation": "100 max(cosine, 0)", "model": model}

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the CLIP score of each pair, (M,) float32 in [0, 100] (Hessel et al. 2021).

        Images (M, 3, H, W) in [-1, 1] are rounded to 8 bits, long captions truncated.
        """
        network = self._network.to(images.device)
        pixels = to_uint8(images).cpu()
        scores = []
        for rows in torch.arange(len(pixels)).split(BATCH):
            texts = [captions[row] for row in rows.tolist()]
            options = {"return_tensors": "pt", "padding": True, "truncation": True}
            inputs = self._processor(text=texts, images=list(pixels[rows]), **options)
            output = network(**inputs.to(images.device))
            scores.append(F.cosine_similarity(output.image_embeds, output.text_embeds).cpu())
        return 100 * torch.cat(scores).clamp(min=0)


def perceptual_network(net: str, backbone: str | Path | None) -> tuple[_NoTrainLpips, str]:
    """Return torchmetrics' LPIPS network with this backbone, and a hash of the backbone."""
    if backbone is None:
        try:
            network = _NoTrainLpips(net=net)  # type: ignore[arg-type]
        except OSError as error:  # URLError is one
            raise ConfigError(
                f"LPIPS: torchvision's weights of {NETS[net]} are not in its cache "
                f"({torch.hub.get_dir()}/checkpoints) and cannot be fetched: {error}; set the "
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
            problem = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            raise ConfigError(
                f"LPIPS: {str(backbone)!r} is no {NETS[net]} of torchvision: features.{source} of "
                f"shape {tuple(state[name].shape)} is needed, the file {problem}"
            )
        state[name] = found
    network.net.load_state_dict(state)
    return network, file_hash(backbone)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .npz, .safetensors, or a file that torch.load reads as weights only.

    Raises:
        ConfigError: if the file is missing or of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"weights: no file {str(path)!r}; expected .pth, .npz or .safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
        found, _ = read_raw(path)
    except ConfigError as error:
        raise ConfigError(f"weights: {error}") from error
    except Exception as error:
        raise ConfigError(f"weights: {str(path)!r} cannot be read: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(f"weights: {str(path)!r} holds no state dict")
    return found


def file_hash(path: str | Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def module_hash(module: nn.Module, *, skip: str | None = None) -> str:
    """Return a hash of a module's state dict, equal for equal names, shapes and values.

    Names that start with `skip` are left out.

    Example:
        >>> module_hash(nn.Identity()) == module_hash(nn.Identity())
        True
    """
    state = module.state_dict()
    return state_hash({k: v for k, v in state.items() if skip is None or not k.startswith(skip)})


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return a hash of a state dict, see :func:`module_hash`."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]
