"""Ablations: plan -> run -> statistics -> report; explorer.py, `lgvq inspect`, stands apart.

This file strings the parts together, so that none of them knows another.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .._arguments import parse_words
from .._files import require_writable, write_json, write_text
from ..sockets import ConfigError
from .base import REPORT, RESULTS, SUMMARY, Results, summary

logger = logging.getLogger(__name__)


def publish(results: Results, folder: Path) -> Path:
    """Write results.json, summary.json, report.html, report.md and two pictures of it.

    Returns the page's path.

    Args:
        results: of all runs; the paths of their examples are below `folder`.
        folder: of the ablation.
    """
    from ._figures import write_figures
    from ._markdown import markdown
    from .report import write_report
    from .statistics import compare

    cells = compare(results)
    results.save(folder / RESULTS)
    write_json(folder / SUMMARY, summary(results, cells))
    pictures = [path.name for path in write_figures(results, cells, folder)]
    write_text((folder / REPORT).with_suffix(".md"), markdown(results, cells, pictures))
    return write_report(results, cells, folder / REPORT, root=folder)


def ablate(
    path: str | Path,
    folder: Path,
    *,
    seeds: int | Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> Path:
    """Run the plan at `path` in `folder` and write its report; returns the path of the page.

    Args:
        path, seeds, overrides: see `plan.read_plan`.
        folder, resume, jobs, progress: see `run.run_plan`.
    """
    from .plan import read_plan
    from .run import run_plan

    plan = read_plan(path, seeds=seeds, overrides=overrides)
    results = run_plan(plan, folder, resume=resume, jobs=jobs, progress=progress)
    return publish(results, folder)


def main(argv: list[str]) -> int:
    """Run `lgvq ablate`.

    Args:
        argv: `-b PLAN... [-o DIR] [--seeds N] [--jobs N] [--resume auto] [key=value ...]`.

    Returns:
        0, or 1 if a run failed; the report is written all the same.
    """
    parser = argparse.ArgumentParser(
        prog="lgvq ablate",
        description="Train and evaluate variants over seeds, and report what differs.",
    )
    parser.add_argument("-b", "--base", nargs="+", action="extend", required=True, metavar="PLAN")
    parser.add_argument("-o", "--out", metavar="DIR", help="default: logs/ablation/<plan's name>")
    parser.add_argument("--seeds", type=int, metavar="N", help="0..N-1 instead of the plan's")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes side by side")
    parser.add_argument("--resume", choices=["auto"], help="go on where runs were left")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    given, overrides = parse_words(parser, argv, "base")
    plans = [Path(word) for word in given.base]
    if not plans:
        raise ConfigError(f"-b {' '.join(overrides)}: expected a plan in YAML, got overrides only")
    has_failed = False
    for plan in plans:
        folder = Path(given.out or "logs/ablation")
        folder = folder / plan.stem if given.out is None or len(plans) > 1 else folder
        require_writable(folder)
        if given.report:
            page = publish(Results.load(folder / RESULTS), folder)
        else:
            page = ablate(
                plan,
                folder,
                seeds=given.seeds,
                overrides=overrides,
                resume=given.resume == "auto",
                jobs=given.jobs,
                progress=not given.no_progress,
            )
        failed = [run for run in Results.load(folder / RESULTS).runs if run.status == "failed"]
        has_failed = has_failed or bool(failed)
        text = page.with_suffix(".md").read_text(encoding="utf-8")
        print(text.partition("\n\n|")[0])  # the summary, without the tables
        logger.info("all numbers: %s and %s", page, page.with_suffix(".md").name)
    return int(has_failed)
