"""A convolutional classifier of torchvision as the image guide: ResNet, ConvNeXt, VGG."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from ..checkpoints.read import read_raw
from ..functional import seeded
from ..hub import require_reachable
from ..sockets import ConfigError, as_config_error, require_known, suggest
from .images import AbstractImageTower, Tower, TowerOptions, require_file, require_layer, square

HEADS = ("classifier.", "fc.", "head.")  # of checkpoints; not read


class TorchvisionGuide(AbstractImageTower):
    """A convolutional model of torchvision without its classifier, by default ResNet-50.

    Arguments as :class:`~.images.AbstractImageTower`. `layer` is a stage of the model: the four of
    a ResNet, or a module of its `features`. `checkpoint` is a file of a state dict, with or without
    the classifier; `pretrained` may name weights, such as IMAGENET1K_V1, and `cache_dir` replaces
    torch's cache. The summary is the mean over the map, as these models have no class token.

    Example:
        >>> import torch
        >>> guide = TorchvisionGuide("squeezenet1_1", pretrained=False, image_size=64)
        >>> features = guide.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
        >>> features.patches.shape, features.grid, features.summary.shape
        (torch.Size([2, 9, 512]), (3, 3), torch.Size([2, 512]))
    """

    default_model = "resnet50"

    def _load(self, given: TowerOptions) -> Tower:
        known = models.list_models(module=models)
        if given.model not in known:
            hint = suggest(given.model, known).partition(" Known:")[0]
            raise ConfigError(
                f"guides.vision.model: no torchvision model {given.model!r}{hint}; "
                "torchvision.models.list_models() lists all"
            )
        facts = _weights(given)
        with seeded(given.seed):
            network = models.get_model(given.model)
        stages = _stages(network, given.model)
        depth = require_layer(given.layer, len(stages) - 1, given.model) + 1
        if given.checkpoint is not None:
            _load_into(network, read_raw(require_file(given.checkpoint))[0], given.checkpoint)
        elif given.pretrained:
            _load_into(network, _downloaded(facts, given), facts.url)
        else:
            self._warn_of_random_weights()
        prepare = facts.transforms()
        size = square(given.image_size or max(prepare.crop_size))
        return Tower(nn.Sequential(*stages[: depth + 1]), size, prepare.mean, prepare.std)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._network(images), None


def _weights(given: TowerOptions) -> Any:
    """Return the weights that `pretrained` names; true and false mean torchvision's default."""
    known: Any = models.get_model_weights(given.model)
    if not isinstance(given.pretrained, str):
        return known.DEFAULT
    problem = f"guides.vision.pretrained: no weights {{!r}} of {given.model!r}"
    require_known([given.pretrained], [each.name for each in known], problem)
    return known[given.pretrained]


def _downloaded(facts: Any, given: TowerOptions) -> Any:
    """Return weights from torch's cache, or the network if it answers within seconds."""
    folder = Path(given.cache_dir or f"{torch.hub.get_dir()}/checkpoints")
    if not (folder / Path(facts.url).name).is_file():
        require_reachable(facts.url, f"torchvision model {facts}", str(folder), "image")
    failed = f"guides.vision: cannot load {facts.url}"  # a broken or foreign file
    with as_config_error(failed, OSError, RuntimeError, UnpicklingError):
        return facts.get_state_dict(model_dir=str(folder), check_hash=True, weights_only=True)


def _stages(network: Any, model: str) -> list[nn.Module]:
    """Return the stem (perhaps empty) and the layers of a model, which run one after another."""
    if isinstance(network, models.ResNet):
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        return [stem, network.layer1, network.layer2, network.layer3, network.layer4]
    if isinstance(getattr(network, "features", None), nn.Sequential):
        return [nn.Identity(), *network.features]
    raise ConfigError(
        f"guides.vision.model: torchvision's {model!r} is neither a ResNet nor has it `features`, "
        "so its map cannot be read; use: timm has transformers"
    )


def _load_into(network: nn.Module, raw: Any, where: str) -> None:
    """Load a state dict of a model; its classifier may be missing."""
    found = raw if isinstance(raw, Mapping) else {}
    own = {k: v for k, v in network.state_dict().items() if not k.startswith(HEADS)}
    wrong = [key for key, value in own.items() if not _is_like(found.get(key), value)]
    if wrong:
        raise ConfigError(
            f"guides.vision.checkpoint: {where} does not have the weights of this model: missing "
            f"or of another shape: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        )
    network.load_state_dict({key: found[key] for key in own}, strict=False)


def _is_like(given: Any, own: Tensor) -> bool:
    return isinstance(given, Tensor) and given.shape == own.shape
