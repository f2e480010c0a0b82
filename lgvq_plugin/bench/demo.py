"""`lgvq demo`: a baseline and LG-VQ from the same seed on the embedded scenes, side by side.

plan.yaml --> ablation: train and evaluate both --> table in the terminal, report.html
"""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from ..files import require_writable
from ..sockets import ConfigError
from .ablate import publish
from .records import MARKS, Results, Run

logger = logging.getLogger(__name__)

PLAN = Path(__file__).parent / "demo_configs" / "plan.yaml"
SHOWN = {  # rows of the terminal's table: metric -> (label, digits)
    "reconstruction/psnr": ("PSNR, dB", 2),
    "reconstruction/ssim": ("SSIM", 4),
    "codebook/usage": ("codebook usage", 3),
    "codebook/perplexity": ("codebook perplexity", 1),
    "retrieval/image_to_text/recall@1": ("image to text R@1", 4),
    "retrieval/image_to_text/recall@5": ("image to text R@5", 4),
    "retrieval/text_to_image/recall@1": ("text to image R@1", 4),
    "retrieval/text_to_image/recall@5": ("text to image R@5", 4),
    "attributes/linear/mean_accuracy": ("attribute accuracy", 4),
    "attributes/few_shot/mean_accuracy": ("the same, few-shot", 4),
}


def demo(
    folder: Path, *, steps: int | None = None, seed: int = 0, progress: bool = True
) -> tuple[Results, Path]:
    """Run the demo in `folder`; what is done there already is not run again.

    Args:
        folder: of the runs and the report.
        steps: of each training; the plan's own if None.
        seed: of weights, data order and draws, the same for both.
        progress: whether to show a bar.

    Returns:
        The results and the path of report.html.

    Raises:
        ConfigError: if the folder holds runs of other settings.
    """
    from .jobs import run_plan
    from .plan import read_plan

    overrides = [] if steps is None else [f"training.max_steps={steps}"]
    plan = read_plan(PLAN, seeds=[seed], overrides=overrides)
    results = run_plan(plan, folder, resume=True, jobs=1, progress=progress)
    return results, publish(results, folder)


def table(results: Results) -> str:
    """Return the rows of :data:`SHOWN`, and the time of a step, for both variants.

    Where a metric has a value of each image, the 95 % interval of the mean difference stands
    beside it: ▲ better or ▼ worse only if it excludes zero.
    """
    runs = {run.variant: run for run in results.runs if run.status == "done"}
    rows = [["", *runs, "difference"]]
    for metric, (label, digits) in SHOWN.items():
        cells = [_cell(run, metric, digits) for run in runs.values()]
        if any(cells):
            rows.append([label, *cells, _interval(runs, metric, digits)])
    times = [run.cost.get("seconds_per_step") for run in runs.values()]
    rows.append(["seconds a step", *("" if t is None else f"{t:.3f}" for t in times), ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cell(run: Run, metric: str, digits: int) -> str:
    row = run.metrics.get(metric)
    value = row["value"] if row else None
    return "" if value is None else f"{value:.{digits}f}"


def _interval(runs: Mapping[str, Run], metric: str, digits: int) -> str:
    from .statistics import difference

    own, other = (
        {runs[name].seed: runs[name].metrics[metric]}
        if name in runs and metric in runs[name].metrics
        else {}
        for name in ("lgvq", "baseline")
    )
    found = difference(own, other, reference="baseline")
    if found is None or found.low is None or found.high is None:
        return ""
    ends = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.value:+.{digits}f} {ends}{MARKS[found.verdict]}"


def main(argv: list[str]) -> int:
    """Run `lgvq demo`.

    Args:
        argv: `[-o DIR] [--steps N] [--seed N] [--no-progress]`.

    Returns:
        0, or 1 if a run failed.
    """
    parser = argparse.ArgumentParser(
        prog="lgvq demo",
        description="Train a VQ-VAE with and without LG-VQ on embedded scenes, and compare them. "
        "Stopped, it goes on where it was when called again.",
    )
    parser.add_argument(
        "-o", "--out", default="lgvq-demo", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of each training")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    given = parser.parse_args(argv)
    for name, least in (("steps", 1), ("seed", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be a whole number >= {least}, got {value}")
    require_writable(Path(given.out))
    begun = time.perf_counter()
    results, page = demo(
        Path(given.out), steps=given.steps, seed=given.seed, progress=not given.no_progress
    )
    print(table(results))
    failed = [run for run in results.runs if run.status != "done"]
    for run in failed:
        print(f"{run.variant}: {run.status}: {run.reason}")
    minutes = (time.perf_counter() - begun) / 60
    print(
        "\nIntervals are over test images (95 %), of one training each: another seed gives other "
        f"numbers.\nReport: {page} ({minutes:.1f} min)"
    )
    return int(bool(failed))
