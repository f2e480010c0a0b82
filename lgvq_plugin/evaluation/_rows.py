"""One number of an evaluation, with all that it depends on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Rows = dict[str, "Row"]


@dataclass(frozen=True)
class Row:
    """A number.

    Args:
        value: of the metric.
        n: images, or questions, it was computed on.
        unit: such as dB; "" for a share or a pure number.
        higher_is_better: None where neither is better, as for a control.
        per_image: the value of each test image, in order, where there is one.
        settings: implementation, weights, resize filter and whatever else it depends on.
    """

    value: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = True
    per_image: Sequence[float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it for JSON; keys that say nothing are left out."""
        told: dict[str, Any] = {
            "value": self.value,
            "n": self.n,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }
        if self.settings:
            told["settings"] = dict(self.settings)
        if self.per_image is not None:
            told["per_image"] = [round(float(value), 6) for value in self.per_image]
        return told


def means_of(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean over images of each (M,) tensor.

    Example:
        >>> means_of({"recall@1": Tensor([0.0, 1.0])})
        {'recall@1': 0.5}
    """
    return {name: float(value.double().mean()) for name, value in values.items()}


def rows_of(
    prefix: str,
    numbers: Mapping[str, float],
    n: int,
    *,
    lower: Sequence[str] = (),
    neutral: Sequence[str] = (),
    unit: str = "",
    settings: Mapping[str, Any] | None = None,
    per_image: Mapping[str, Iterable[float]] | None = None,
) -> Rows:
    """Return `prefix/NAME` -> Row of each number.

    Args:
        prefix: of the names.
        numbers: by name.
        n: of all.
        lower: parts of a name that say that lower is better.
        neutral: parts of a name that say that neither is, such as shuffled.
        unit: of all.
        settings: of all.
        per_image: values of each image, by name, of those numbers that are their mean.

    Example:
        >>> numbers = {"accuracy": 0.5, "shuffled/accuracy": 0.1}
        >>> rows = rows_of("vqa", numbers, 8, neutral=["shuffled"])
        >>> rows["vqa/shuffled/accuracy"].higher_is_better is None
        True
    """
    rows: Rows = {}
    for name, value in numbers.items():
        better: bool | None = not any(part in name for part in lower)
        if any(part in name for part in neutral):
            better = None
        each = (per_image or {}).get(name)
        values = None if each is None else [float(one) for one in each]
        rows[f"{prefix}/{name}"] = Row(float(value), n, unit, better, values, settings or {})
    return rows
