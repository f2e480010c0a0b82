"""Small parts of LGVQLoss: the check of the optimizer, a view of modules, adding terms."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .alignment import Captions
from .sockets import ConfigError

logger = logging.getLogger(__name__)

CAPTION_KEYS = ("caption", "captions", "text", "txt")


class Reference:
    """Holds a module without making it a submodule; survives copies and pickles."""

    def __init__(self, module: nn.Module):
        self.module = module


class OptimizerCheck:
    """Looks, once, whether the optimizer that steps the host holds the heads too."""

    def __init__(self, heads: Iterable[nn.Parameter], host: Iterable[nn.Parameter]):
        self.heads = {id(p) for p in heads if p.requires_grad}
        self.host = {id(p) for p in host}
        self.failed: str | None = None
        self._hook: Any = register_optimizer_step_post_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held & self.host and not held & self.heads:
            return
        self._hook.remove()
        if not self.heads <= held:
            self.failed = (
                "the optimizer that trains the host does not hold the heads of LG-VQ, so they "
                "would never learn; call loss.add_heads(optimizer) after building it"
            )
            self.raise_if_failed()

    def raise_if_failed(self) -> None:
        if self.failed is not None:
            raise RuntimeError(self.failed)


class View(nn.Module):
    """Submodules of a host as they will be once the one under registration is in."""

    def __init__(self, modules: Mapping[str, nn.Module | None]):
        super().__init__()
        self._modules.update(modules)


def captions_of(batch: Any, key: str | None) -> Captions | None:
    """Return the captions of a batch, at `key` or one of the usual keys; None if it has none.

    Raises:
        ConfigError: if the key is missing, or there is no list at it.
    """
    if not isinstance(batch, Mapping):
        return None
    if key is not None and key not in batch:
        raise ConfigError(
            f"lgvq.caption_key: the batch has no {key!r}; it has {', '.join(map(str, batch))}"
        )
    found = next((batch[k] for k in ((key,) if key else CAPTION_KEYS) if k in batch), None)
    if found is not None and (isinstance(found, str) or not hasattr(found, "__len__")):
        raise ConfigError(
            f"captions of a batch must be a list with an entry an image, got {found!r:.80}"
        )
    return found


def add_terms(result: Any, terms: Tensor, log: dict[str, Tensor]) -> Any:
    """Add to what a base loss returns: a scalar, (loss, log), or more after these."""
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], Mapping):
        return (result[0] + terms, {**result[1], **log}, *result[2:])
    if isinstance(result, tuple):
        return (result[0] + terms, *result[1:])
    return result + terms


def plain(node: Any) -> Any:
    """Return OmegaConf's containers, or any others, as dicts and lists.

    Example:
        >>> from omegaconf import OmegaConf
        >>> plain(OmegaConf.create({"grid": [4, 4]}))
        {'grid': [4, 4]}
    """
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return [plain(value) for value in node]
    return node


def grid_of(host: nn.Module) -> tuple[int, int] | None:
    """Return (h, w) of the codes of a taming-style decoder, which knows it; else None."""
    shape = getattr(getattr(host, "decoder", None), "z_shape", None)
    return (int(shape[-2]), int(shape[-1])) if shape is not None and len(shape) == 4 else None


def forgive_missing_heads(module: nn.Module, incompatible: Any) -> None:
    """A host's own checkpoint has no heads: that is no error, also when loading strictly."""
    missing = incompatible.missing_keys
    heads = module._modules.get("lgvq")
    ours = [key for key in missing if ".lgvq." in f".{key}"]
    if heads is not None and len(ours) == len(heads.state_dict()):
        for key in ours:
            missing.remove(key)
        logger.info("the checkpoint has no LG-VQ heads; they start from their seed")
