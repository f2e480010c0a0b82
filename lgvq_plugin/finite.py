"""Name the parameters whose numbers are not finite."""

from collections.abc import Iterable, Sequence

from torch import nn

from .functional import all_finite

MAX_SKIPPED = 25
"""Updates in a row that may be left out: by then fp16's scale has fallen from 2^16 to 2^-9."""

LARGEST_GRADIENT = 1e19
"""Beyond 1.8e19 the squares that Adam keeps are infinite in float32."""


def nonfinite_gradients(module: nn.Module, among: Iterable[nn.Parameter]) -> str:
    """Say which of the parameters `among` those of `module` have a bad gradient, by part."""
    held = {id(p) for p in among}
    bad = {
        name: p.grad
        for name, p in module.named_parameters()
        if id(p) in held and p.grad is not None and not all_finite([p.grad], limit=LARGEST_GRADIENT)
    }
    if not bad:
        return "not finite on another process"
    what = f"above {LARGEST_GRADIENT:.0e}" if all_finite([*bad.values()]) else "not finite"
    return f"{what} in {in_groups([*bad])}"


def in_groups(names: Sequence[str]) -> str:
    """Summarize parameters' names by the part of the host that they belong to.

    >>> in_groups(["encoder.a", "encoder.b", "loss.lgvq.c", "loss.discriminator.d"])
    'encoder (encoder.a and 1 more), heads (loss.lgvq.c), discriminator (loss.discriminator.d)'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        label = parts[1] if parts[0] == "loss" and len(parts) > 2 else parts[0]
        groups.setdefault("heads" if label == "lgvq" else label, []).append(name)
    return ", ".join(
        f"{label} ({found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''})"
        for label, found in groups.items()
    )
