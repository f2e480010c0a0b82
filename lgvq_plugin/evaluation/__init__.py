"""Measure what a codebook knows: `evaluate(host, config, ...)`, and `lgvq eval`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._config import EvaluationConfig
from .run import main

if TYPE_CHECKING:
    from .base import METRICS as METRICS
    from .base import evaluate as evaluate

__all__ = ["METRICS", "EvaluationConfig", "evaluate", "main"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: `lgvq eval --help` needs none."""
    if name in ("METRICS", "evaluate"):
        return getattr(import_module(f"{__name__}.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
