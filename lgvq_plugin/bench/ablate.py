"""Ablations: plan -> run -> statistics -> report; and `lgvq inspect`, the page of explorer.py.

This file strings the parts together, so that none of them knows another. torch is imported once
the arguments and the plan are checked.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import parse_words
from ..checkpoints import find_checkpoint
from ..files import require_writable, write_json, write_text
from ..sockets import ConfigError, path_of
from ..training.config import Sections, lgvq_block, read_config
from .records import DIFFERENCES, REPORT, RESULTS, SUMMARY, VALUES, Results, summary

logger = logging.getLogger(__name__)


def publish(results: Results, folder: Path) -> Path:
    """Write the results, their tables and the report of an ablation to `folder`.

    The files are results.json, summary.json, values.csv (one line per run and metric),
    differences.csv (one line per paired difference, with its interval), report.html, report.md,
    and two PNG figures.

    Returns the page's path.

    Args:
        results: of all runs; the paths of their examples are below `folder`.
        folder: of the ablation.
    """
    from .figures import write_figures
    from .report import differences_csv, markdown, values_csv, write_report
    from .statistics import compare

    cells = compare(results)
    results.save(folder / RESULTS)
    write_json(folder / SUMMARY, summary(results, cells))
    write_text(folder / VALUES, values_csv(results))
    write_text(folder / DIFFERENCES, differences_csv(cells))
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

    plan = read_plan(path, seeds=seeds, overrides=overrides)
    from .jobs import run_plan

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


def inspect(argv: list[str]) -> int:
    """Run `lgvq inspect`.

    Args:
        argv: `--ckpt C [--ckpt BASELINE] -o DIR [-b CONFIG...] [--limit N] [--guide NAME]`.
    """
    parser = argparse.ArgumentParser(
        prog="lgvq inspect",
        description="Write a page that shows the codes of one or two checkpoints.",
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--ckpt", **several, required=True, metavar="CKPT",
                        help="one, or two to compare")  # fmt: skip
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="gets codebook.html")
    parser.add_argument("-b", "--base", **several, metavar="CONFIG", help="default: the run's own")
    parser.add_argument(
        "--name", **several, metavar="NAME", help="of each checkpoint; default: its run's"
    )
    parser.add_argument("--limit", type=int, default=512, help="images counted (default: 512)")
    parser.add_argument("--show", type=int, default=48, help="images on the page (default: 48)")
    parser.add_argument("--guide", help="text guide of the word map; default: the run's own, else "
                        "micro_clip; none: no map")  # fmt: skip
    parser.add_argument("--averaged", action="store_true", help="take averaged (EMA) weights")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle old checkpoints")
    given = parser.parse_args(argv)
    if len(given.ckpt) > 2 or len(given.name or given.ckpt) != len(given.ckpt):
        raise ConfigError("give one or two to --ckpt, and as many to --name or none")
    if given.limit < 1 or given.show < 1:
        raise ConfigError(f"--limit and --show must be > 0, got {given.limit} and {given.show}")
    if given.guide not in (None, "none"):
        path_of("guides", given.guide)
    require_writable(Path(given.out))
    for path in given.ckpt:
        find_checkpoint(path)
    config = read_config(given.base) if given.base else None
    from ..checkpoints.load import load_checkpoint, load_host
    from ..device import choose_device
    from ..guides.base import build_guide
    from .explorer import read_samples, write_explorer

    read = [load_checkpoint(path, given.trust_pickle) for path in given.ckpt]
    names = _distinct(given.name or [_run_name(checkpoint.path) for checkpoint in read])
    device = choose_device()
    # A run's own config says its host; -b stands in where there is none, and for the data.
    hosts = {
        name: load_host(
            checkpoint.config or config, checkpoint, device=device, averaged=given.averaged
        )
        for name, checkpoint in zip(names, read, strict=True)
    }
    configs = [found for found in (config, *(one.config for one in read)) if found]
    data = Sections.from_config(configs[0]).data
    samples = read_samples(data.test or data.validation or data.train, given.limit)
    block = next((found for one in configs if (found := lgvq_block(one).get("guide"))), None)
    chosen = {"use": given.guide} if given.guide else block or {"use": "micro_clip"}
    guide = None if given.guide == "none" else build_guide(chosen)
    page = write_explorer(hosts, samples, Path(given.out), guide=guide, shown=given.show)
    logger.info("%s", page)
    return 0


def _run_name(path: Path) -> str:
    """Name of the run folder that a checkpoint lies in, else of the file."""
    if path.parent.name != "checkpoints":
        return path.stem
    run = path.parent.parent
    return f"{run.parent.name}, {run.name}" if run.name.startswith("seed_") else run.name


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(names)]
