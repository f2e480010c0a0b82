"""Measure what a codebook knows: `evaluate(host, config, ...)`, and `lgvq eval`."""

from .base import METRICS, EvaluationConfig, evaluate
from .run import main

__all__ = ["METRICS", "EvaluationConfig", "evaluate", "main"]
