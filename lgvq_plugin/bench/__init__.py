"""Measuring: metrics, probes on frozen codes, evaluation, ablations, reports and the demo."""
