"""Ablations and pages: plan.py -> run.py -> statistics.py -> report.py; explorer.py is apart."""
