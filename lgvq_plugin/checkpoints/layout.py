"""Where the host's tensors lie in a checkpoint: roots, prefixes, averaged weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..sockets import ConfigError, suggest

ROOTS = ("state_dict", "model", "vae", "ema")
AVERAGES = ("ema_state_dict", "ema", "averaging_state")
WRAPPERS = ("module.", "_orig_mod.")
OWNERS = ("first_stage_model.", "model.")  # the tokenizer in a larger model's checkpoint
EMA = "model_ema."


@dataclass(frozen=True)
class Layout:
    """Tensors of a checkpoint, sorted.

    Args:
        state_dict: of the host, prefixes taken off.
        averaged: averaged weights by the same names, or None.
        aside: whatever else lay beside them, by its own name.
        root: the key that held the state dict; "" if the file is one itself.
        prefix: what was taken off.
    """

    state_dict: dict[str, Tensor]
    averaged: dict[str, Tensor] | None = None
    aside: dict[str, Tensor] = field(default_factory=dict)
    root: str = ""
    prefix: str = ""


def sort_tensors(raw: Any, *, root: str | None = None) -> Layout:
    """Find the host's state dict in what a checkpoint file holds.

    Args:
        raw: the file's content, in plain containers.
        root: key of the state dict; None tries the usual ones.

    Raises:
        ConfigError: if there are no tensors, or not at `root`.

    Example:
        >>> import torch
        >>> found = sort_tensors({"model": {"module.weight": torch.zeros(1)}, "steps": 3})
        >>> found.root, found.prefix, list(found.state_dict)
        ('model', 'module.', ['weight'])
    """
    found, tensors = _choose_root(raw, root)
    tensors, wrapper = strip_wrappers(tensors)
    tensors, aside, owner = _strip_owner(tensors)
    own = {key: value for key, value in tensors.items() if not key.startswith(EMA)}
    copy = {key: value for key, value in tensors.items() if key.startswith(EMA)}
    prefix = wrapper + owner
    averaged = _averaged_elsewhere(raw, found) if copy == {} else None
    if copy and own:
        averaged = unflatten({key[len(EMA) :]: value for key, value in copy.items()}, own)
    elif copy:  # nothing but averaged weights
        own = {key[len(EMA) :]: value for key, value in copy.items()}
        own = {key: value for key, value in own.items() if key not in ("decay", "num_updates")}
        copy, prefix = {}, prefix + EMA
    return Layout(own, averaged, {**aside, **copy}, found, prefix)


def unflatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Give averaged weights their names back; latent-diffusion's LitEma drops all dots.

    Example:
        >>> import torch
        >>> list(unflatten({"ab": torch.zeros(1), "decay": torch.ones(1)}, ["a.b"]))
        ['a.b']
    """
    known = {name.replace(".", ""): name for name in names}
    return {known[key.replace(".", "")]: v for key, v in tensors.items()
            if key.replace(".", "") in known}  # fmt: skip


def strip_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Take off what DDP and torch.compile put before (or, compiled parts, within) the names."""
    kept, taken = dict(tensors), ""
    while kept:
        wrapper = next((w for w in WRAPPERS if all(key.startswith(w) for key in kept)), None)
        if wrapper is None:
            break
        kept = {key[len(wrapper) :]: value for key, value in kept.items()}
        taken += wrapper
    if any("_orig_mod." in key for key in kept):
        kept, taken = (
            {k.replace("_orig_mod.", ""): v for k, v in kept.items()},
            taken + "_orig_mod.",
        )
    return kept, taken


def _strip_owner(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    for owner in OWNERS:
        inside = {key[len(owner) :]: v for key, v in tensors.items() if key.startswith(owner)}
        is_tokenizer = owner == OWNERS[0] or len(inside) == len(tensors)
        if inside and is_tokenizer:
            aside = {key: v for key, v in tensors.items() if not key.startswith(owner)}
            return inside, aside, owner
    return tensors, {}, ""


def _choose_root(raw: Any, root: str | None) -> tuple[str, dict[str, Tensor]]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"the checkpoint holds a {type(raw).__name__}, expected a state dict")
    if root is not None:
        if not _tensors(raw.get(root)):
            raise ConfigError(f"no tensors at {root!r}{suggest(root, [str(key) for key in raw])}")
        return root, _tensors(raw[root])
    if "state_dict" in raw and not _tensors(raw["state_dict"]):
        found = type(raw["state_dict"]).__name__
        raise ConfigError(f"its state_dict is a {found} without tensors; expected name: tensor")
    for name in ROOTS:
        if _tensors(raw.get(name)):
            return name, _tensors(raw[name])
    tensors = _tensors(raw)
    if not tensors:
        raise ConfigError(
            f"no tensors in the checkpoint; expected a state dict, alone or at one of "
            f"{', '.join(ROOTS)}; it has {sorted(map(str, raw))[:10]}"
        )
    return "", tensors


def _tensors(node: Any) -> dict[str, Tensor]:
    if not isinstance(node, Mapping):
        return {}
    return {str(key): value for key, value in node.items() if isinstance(value, Tensor)}


def _averaged_elsewhere(raw: Mapping[Any, Any], root: str) -> dict[str, Tensor] | None:
    for name in AVERAGES:
        if name != root and (tensors := _tensors(raw.get(name))):
            stripped = strip_wrappers(tensors)[0]
            return _strip_owner(stripped)[0]
    return None
