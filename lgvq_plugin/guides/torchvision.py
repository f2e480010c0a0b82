"""A convolutional classifier of torchvision as the image guide: ResNet, ConvNeXt, VGG."""

import logging
from typing import Any

from torch import Tensor, nn
from torchvision import models

from ..checkpoints.read import read_raw
from ..functional import seeded
from ..sockets import ConfigError, suggest
from .images import AbstractImageTower, Tower, TowerOptions, require_file, require_layer, square

logger = logging.getLogger(__name__)

HEADS = ("classifier.", "fc.", "head.")  # of checkpoints; not read


class TorchvisionGuide(AbstractImageTower):
    """A convolutional model of torchvision without its classifier, by default ResNet-50.

    Arguments as :class:`~.images.AbstractImageTower`. `layer` is a stage of the model: the four of
    a ResNet, or a module of its `features`. `checkpoint` is a file of a state dict, with or without
    the classifier. The summary is the mean over the map, as these models have no class token.

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
        facts: Any = models.get_model_weights(given.model).DEFAULT
        with seeded(given.seed):
            try:
                is_plain = given.checkpoint is not None or not given.pretrained
                network = models.get_model(given.model, weights=None if is_plain else facts)
            except OSError as error:  # no network, or no such place
                raise ConfigError(
                    f"guides.vision: cannot download the weights of {given.model!r} from "
                    f"{facts.url}: {error}; give checkpoint: PATH"
                ) from error
        if given.checkpoint is not None:
            _read_into(network, given)
        elif not given.pretrained:
            message = "guides.vision: %s has random weights (pretrained: false); for tests only"
            logger.warning(message, given.model)
        stages = _stages(network, given.model)
        depth = require_layer(given.layer, len(stages) - 1, given.model) + 1
        prepare = facts.transforms()
        size = square(given.image_size or max(prepare.crop_size))
        return Tower(nn.Sequential(*stages[: depth + 1]), size, prepare.mean, prepare.std)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._network(images), None


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


def _read_into(network: nn.Module, given: TowerOptions) -> None:
    """Load the checkpoint of a model; its classifier may be missing."""
    assert given.checkpoint is not None
    raw, _ = read_raw(require_file(given.checkpoint))
    found = {k: v for k, v in raw.items() if isinstance(v, Tensor)} if isinstance(raw, dict) else {}
    wanted = {k for k in network.state_dict() if not k.startswith(HEADS)}
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = [k for k in sorted(wanted) if k not in found or tuple(found[k].shape) != shapes[k]]
    if wrong:
        raise ConfigError(
            f"guides.vision.checkpoint: {given.checkpoint} does not have the weights of "
            f"{given.model!r}: missing or of another shape: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''}"
        )
    network.load_state_dict({key: found[key] for key in wanted}, strict=False)
