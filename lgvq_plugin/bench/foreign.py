"""Metrics and probes of other packages, measured like ours: the contract.

A metric is a function from a context to rows, named by its path (`--metrics my_pkg.mod:sharpness`,
or `metrics:` of an ablation's `evaluation:`) or by an entry point of the group
`lgvq_plugin.metrics`. The context has the host, its data, codes and reconstructions, the guide and
the heads, each computed on first use; the metric is called under `torch.no_grad()`. Its keyword
arguments are keys of `evaluation.options.sharpness`:

    >>> from types import SimpleNamespace
    >>> import torch
    >>> from lgvq_plugin.bench.measures import rows_of
    >>> def sharpness(context, *, power=1):
    ...     parts = [given.diff(dim=-1).abs() ** power for images, given in context.pairs()]
    ...     values = torch.cat([part.mean(dim=(1, 2, 3)) for part in parts])  # of each image
    ...     return rows_of("sharpness", {"mean": values}, len(values))
    >>> pairs = [(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))]
    >>> sharpness(SimpleNamespace(pairs=lambda: pairs))["sharpness/mean"].value
    0.0

A probe is a subclass of :class:`~lgvq_plugin.bench.probes.AbstractProbe` (its attributes `source`
and `target` say what it reads), named likewise; its group is `lgvq_plugin.probes`, and its
constructor takes the options. It is fitted on the training images, and evaluated on the test images
and, as a control, on shuffled codes.

Importing this imports no torch.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import require, verify
from ..sockets import ConfigError, check_call, import_target, registered, suggest
from .probes import AbstractProbe

if TYPE_CHECKING:
    from .evaluation_context import Context
    from .measures import Rows


def path_of_metric(name: Any, ours: Sequence[str]) -> str:
    """Return the dotted path of a metric or probe that is not among `ours`.

    Raises:
        ConfigError: if it is no dotted path, and no entry point has this name.
    """
    known = {**registered("probes"), **registered("metrics")}
    if isinstance(name, str) and ("." in name or ":" in name):
        return name
    if isinstance(name, str) and name in known:
        return known[name]
    near = suggest(name, [*ours, *known])
    raise ConfigError(f"metrics: no {name!r}{near}; or give 'pkg.module:function'")


def label_of(name: str) -> str:
    """Return the name of a metric in files and in `evaluation.options`: the last part of a path.

    >>> label_of("my_pkg.mod:sharpness"), label_of("psnr")
    ('sharpness', 'psnr')
    """
    return name.replace(":", ".").rpartition(".")[2]


def find_metric(
    name: str, ours: Sequence[str], options: Mapping[str, Any] | None = None
) -> "Callable[[Context], Rows]":
    """Import a metric or a probe of another package, and return it as a function of a context.

    Raises:
        ConfigError: if it does not exist, is neither, or does not take the options.
    """
    target = import_target(path_of_metric(name, ours))
    is_class = isinstance(target, type)
    is_probe = is_class and issubclass(target, AbstractProbe)
    expected = "a function of a context, or a subclass of lgvq_plugin.bench.probes.AbstractProbe"
    require(callable(target) and is_class == is_probe, f"metrics: {name}", expected, target)
    where = f"evaluation.options.{label_of(name)}"
    check_call(where, target, () if is_probe else (None,), options or {})
    return partial(_measure, name, target, options or {}, is_probe)


def source_of(metric: "Callable[[Context], Rows]") -> str:
    """Return a hash of the file that defines what :func:`find_metric` found.

    Finished metrics are measured again once it has changed.
    """
    target = metric.args[1]  # type: ignore[attr-defined]
    try:
        content = Path(inspect.getfile(inspect.unwrap(target))).read_bytes()
    except (TypeError, OSError):  # of a callable object, or in an archive
        return repr(target)
    return hashlib.sha256(content).hexdigest()[:16]


def _measure(
    name: str, target: Any, options: Mapping[str, Any], is_probe: bool, context: "Context"
) -> "Rows":
    import torch

    from .measures import Row

    with torch.no_grad():
        rows = _probe_rows(name, target, options, context) if is_probe else None
        rows = target(context, **options) if rows is None else rows
    where = f"evaluation.metrics: {name}"
    require(isinstance(rows, Mapping) and len(rows) > 0, where, "a mapping of names to rows", rows)
    for key, row in rows.items():
        is_row = isinstance(key, str) and isinstance(row, Row)
        require(is_row, f"{where}: {key}", "a lgvq_plugin.bench.measures.Row", row)
        verify(row.to_dict(), Row, f"{where}: {key}")
    return dict(rows)


def _probe_rows(name: str, probe: Any, options: Mapping[str, Any], context: "Context") -> "Rows":
    """Fit a probe on the training set; its numbers on the test set and on shuffled codes."""
    import torch

    from .measures import rows_of

    parts = []
    for which, data in (("train", context.train), ("test", context.test)):
        given = data.captioned() if probe.target == "captions" else data
        target = getattr(given, probe.target, None)
        if not target:
            raise ConfigError(f"{name}: the {which} set has no {probe.target}")
        parts.append((given.codes, target))
    (codes, target), (seen, wanted) = parts
    read = (lambda c: c.features()) if probe.source == "features" else (lambda c: c)
    with torch.enable_grad():
        fitted = probe(**options).fit(read(codes), target)
    numbers = dict(fitted.evaluate(read(seen), wanted))
    control = fitted.evaluate(read(seen.shuffled(context.config.seed)), wanted)
    numbers |= {f"shuffled/{key}": value for key, value in control.items()}
    settings = {"train_images": len(codes), "options": dict(options)}
    return rows_of(label_of(name), numbers, len(seen), settings=settings)
