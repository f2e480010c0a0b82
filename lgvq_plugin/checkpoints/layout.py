"""Find the host's tensors in a checkpoint: roots, prefixes, averaged weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..sockets import ConfigError, suggest

ROOTS = ("state_dict", "model", "vae", "ema")
AVERAGES = ("ema_state_dict", "ema", "averaging_state")
WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile
OWNERS = ("first_stage_model.", "model.")  # the tokenizer in a larger model's checkpoint
EMA = "model_ema."


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensors of a checkpoint, sorted."""

    state_dict: dict[str, Tensor]
    """The host's tensors, without prefixes."""
    averaged: dict[str, Tensor] | None = None
    """Averaged (EMA) weights under the same names, or None."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """All other tensors, under their own names."""
    root: str = ""
    """Key that held the state dict; "" if the file is one itself."""
    prefix: str = ""
    """Prefix that was removed."""


def sort_tensors(raw: Any, *, root: str | None = None) -> Layout:
    """Find the host's state dict in a checkpoint's content: at `root`, or at one of ROOTS.

    Raises ConfigError if there are no tensors, or none at `root`.

    >>> import torch
    >>> found = sort_tensors({"model": {"module.weight": torch.zeros(1)}, "steps": 3})
    >>> found.root, found.prefix, list(found.state_dict)
    ('model', 'module.', ['weight'])
    """
    found, tensors = _choose_root(raw, root)
    tensors, wrapper = _strip_wrappers(tensors)
    tensors, aside, owner = _strip_owner(tensors)
    prefix = wrapper + owner
    copy, own = split(tensors, EMA)
    averaged = unflatten(copy, own) if copy else _averaged_elsewhere(raw, found)
    if copy and not own:  # nothing but averaged weights
        own = {key: copy[key] for key in copy if key not in ("decay", "num_updates")}
        copy, averaged, prefix = {}, None, prefix + EMA
    aside |= {EMA + key: value for key, value in copy.items()}
    return Layout(state_dict=own, averaged=averaged, aside=aside, root=found, prefix=prefix)


def split(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors below a prefix, without it, and the other ones."""
    inside = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    return inside, {key: tensors[key] for key in tensors if not key.startswith(prefix)}


def unflatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Restore the names of averaged weights; latent-diffusion's LitEma drops all dots.

    >>> import torch
    >>> list(unflatten({"ab": torch.zeros(1), "decay": torch.ones(1)}, ["a.b"]))
    ['a.b']
    """
    known = {name.replace(".", ""): name for name in names}
    flat = {key.replace(".", ""): value for key, value in tensors.items()}
    return {known[key]: value for key, value in flat.items() if key in known}


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
    for name, node in [*((name, raw.get(name)) for name in ROOTS), ("", raw)]:
        if tensors := _tensors(node):
            return name, tensors
    raise ConfigError(
        f"no tensors in the checkpoint; expected a state dict, alone or at one of "
        f"{', '.join(ROOTS)}; it has {sorted(map(str, raw))[:10]}"
    )


def _tensors(node: Any) -> dict[str, Tensor]:
    if not isinstance(node, Mapping):
        return {}
    return {str(key): value for key, value in node.items() if isinstance(value, Tensor)}


def _strip_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove what DDP and torch.compile put before (or, for compiled parts, within) the names."""
    removed = ""
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in tensors)), ""):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
        removed += wrapper
    if any("_orig_mod." in key for key in tensors):
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
        removed += "_orig_mod."
    return tensors, removed


def _strip_owner(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return the tokenizer's tensors, the other ones, and the prefix of the tokenizer's."""
    for owner in OWNERS:
        inside, aside = split(tensors, owner)
        if inside and (owner == OWNERS[0] or not aside):
            return inside, aside, owner
    return tensors, {}, ""


def _averaged_elsewhere(raw: Mapping[Any, Any], root: str) -> dict[str, Tensor] | None:
    for name in AVERAGES:
        if name != root and (tensors := _tensors(raw.get(name))):
            return _strip_owner(_strip_wrappers(tensors)[0])[0]
    return None
