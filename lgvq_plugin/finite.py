"""Name the parameters whose numbers are not finite."""

from collections.abc import Iterable, Sequence

from torch import nn

from .functional import all_finite

MAX_SKIPPED = 25
"""Updates in a row that may be left out: by then fp16's scale has fallen from 2^16 to 2^-9."""


def nonfinite_gradients(module: nn.Module, among: Iterable[nn.Parameter]) -> str:
    """Name the parameters `among` those of `module` whose gradient is not finite, by part."""
    held = {id(p) for p in among}
    return in_groups([
        name
        for name, p in module.named_parameters()
        if id(p) in held and p.grad is not None and not all_finite([p.grad])
    ])  # fmt: skip


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
