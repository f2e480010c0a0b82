"""`lgvq ablate` (plan -> runs -> statistics -> report) and `lgvq inspect` (codebook explorer).

torch is imported after the arguments and the plan have been checked.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import parse_words
from ..checkpoints import find_checkpoint
from ..files import remove_parts, require_writable, write_json, write_text
from ..sockets import ConfigError, path_of
from ..training.config import lgvq_block, read_config
from .records import DIFFERENCES, REPORT, RESULTS, SUMMARY, VALUES, Results

logger = logging.getLogger(__name__)


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
    """Run the plan at `path` in `folder` and write its report; return the path of the page.

    Args:
        path, seeds, overrides: see `plan.read_plan`.
        folder, resume, jobs, progress: see `jobs.run_plan`.
    """
    from .plan import read_plan

    plan = read_plan(path, seeds=seeds, overrides=overrides)
    from .jobs import run_plan

    results = run_plan(plan, folder, resume=resume, jobs=jobs, progress=progress)
    return publish(results, folder)


def publish(results: Results, folder: Path) -> Path:
    """Write results, tables, figures and report to `folder`; return the path of the page.

    Writes results.json, summary.json, values.csv (a line per run and metric), differences.csv (a
    line per paired difference, with its interval), report.html, report.md and two PNG figures.
    The paths of the results' examples are relative to `folder`.
    """
    from .figures import write_figures
    from .report import differences_csv, markdown, summary, values_csv, write_report
    from .statistics import compare

    cells = compare(results)
    results.save(folder / RESULTS)
    write_json(folder / SUMMARY, summary(results, cells))
    write_text(folder / VALUES, values_csv(results))
    write_text(folder / DIFFERENCES, differences_csv(cells))
    pictures = [path.name for path in write_figures(results, cells, folder)]
    write_text((folder / REPORT).with_suffix(".md"), markdown(results, cells, pictures))
    return write_report(results, cells, folder / REPORT, root=folder)


def main(argv: list[str]) -> int:
    """Run `lgvq ablate`; return 1 if a run failed (the report is written anyway), else 0."""
    parser = argparse.ArgumentParser(
        prog="lgvq ablate",
        description="Train and evaluate variants over several seeds, and report the differences.",
    )
    parser.add_argument("-b", "--base", nargs="+", action="extend", required=True, metavar="PLAN")
    parser.add_argument("-o", "--out", metavar="DIR", help="default: logs/ablation/PLAN")
    parser.add_argument("--seeds", type=int, metavar="N", help="use seeds 0 to N-1")
    parser.add_argument("--jobs", type=int, metavar="N", help="number of parallel processes")
    parser.add_argument("--resume", choices=["auto"], help="resume unfinished runs")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--no-progress", action="store_true", help="hide the progress bar")
    args, overrides = parse_words(parser, argv, "base")
    plans = [Path(word) for word in args.base]
    if not plans:
        raise ConfigError(f"-b {' '.join(overrides)}: expected a plan in YAML, got overrides only")
    has_failed = False
    for plan in plans:
        folder = Path(args.out or "logs/ablation")
        folder = folder / plan.stem if args.out is None or len(plans) > 1 else folder
        require_writable(folder)
        if args.report:
            remove_parts(folder)
            page = publish(Results.load(folder / RESULTS), folder)
        else:
            options = {"seeds": args.seeds, "jobs": args.jobs, "overrides": overrides}
            options |= {"resume": args.resume == "auto", "progress": not args.no_progress}
            page = ablate(plan, folder, **options)
        runs = Results.load(folder / RESULTS).runs
        has_failed = has_failed or any(run.status == "failed" for run in runs)
        text = page.with_suffix(".md").read_text(encoding="utf-8")
        print(text.partition("\n\n|")[0])  # the summary, without the tables
        logger.info("all numbers: %s and %s", page, page.with_suffix(".md").name)
    return int(has_failed)


def inspect(argv: list[str]) -> int:
    """Run `lgvq inspect`."""
    parser = argparse.ArgumentParser(
        prog="lgvq inspect",
        description="Write a page that shows the codes of one or two checkpoints.",
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--ckpt", **several, required=True, metavar="CKPT",
                        help="one checkpoint, or two to compare")  # fmt: skip
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="output folder of codebook.html"
    )
    parser.add_argument("-b", "--base", **several, metavar="CONFIG", help="default: the run's")
    parser.add_argument("--name", **several, metavar="NAME",
                        help="display name of each checkpoint; default: its run's")  # fmt: skip
    parser.add_argument("--limit", type=int, default=512, help="images to encode (default: 512)")
    parser.add_argument("--show", type=int, default=48, help="images on the page (default: 48)")
    parser.add_argument("--guide", help="text guide of the word map (none: no map); "
                        "default: the run's, else micro_clip")  # fmt: skip
    parser.add_argument("--averaged", action="store_true", help="use the EMA weights")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle old checkpoints")
    args = parser.parse_args(argv)
    if len(args.ckpt) > 2 or len(args.name or args.ckpt) != len(args.ckpt):
        raise ConfigError("--ckpt takes one or two checkpoints, and --name as many names")
    if args.limit < 1 or args.show < 1:
        raise ConfigError(f"--limit and --show must be > 0, got {args.limit} and {args.show}")
    if args.guide not in (None, "none"):
        path_of("guides", args.guide)
    require_writable(Path(args.out))
    remove_parts(Path(args.out), inside=False)
    for path in args.ckpt:
        find_checkpoint(path)
    config = read_config(args.base) if args.base else None
    from ..arguments import choose_device
    from ..checkpoints.load import load_checkpoint, load_host
    from ..guides.base import build_guide
    from .explorer import read_samples, write_explorer

    checkpoints = [load_checkpoint(path, args.trust_pickle) for path in args.ckpt]
    names = args.name or [_run_name(checkpoint.path) for checkpoint in checkpoints]
    names = [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, 1)]
    device = choose_device()
    # The host is built from the run's own config; -b is used where there is none, and for the data.
    hosts = {
        name: load_host(one.config or config, one, device=device, averaged=args.averaged)
        for name, one in zip(names, checkpoints, strict=True)
    }
    configs = [found for found in (config, *(one.config for one in checkpoints)) if found]
    samples = read_samples(configs[0], args.limit)
    block = next((found for one in configs if (found := lgvq_block(one).get("guide"))), None)
    chosen = {"use": args.guide} if args.guide else block or {"use": "micro_clip"}
    guide = None if args.guide == "none" else build_guide(chosen)
    page = write_explorer(hosts, samples, Path(args.out), guide=guide, shown=args.show)
    logger.info("%s", page)
    return 0


def _run_name(path: Path) -> str:
    """Return the name of the run folder of a checkpoint, else of the file."""
    if path.parent.name != "checkpoints":
        return path.stem
    run = path.parent.parent
    return f"{run.parent.name}, {run.name}" if run.name.startswith("seed_") else run.name
