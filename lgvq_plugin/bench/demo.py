"""`lgvq demo`: train a tokenizer with and without LG-VQ on embedded scenes, and compare them."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from ..files import require_writable
from ..sockets import ConfigError
from .ablate import publish
from .records import Results, text_table

logger = logging.getLogger(__name__)

PLAN = Path(__file__).parent / "demo_configs" / "plan.yaml"
ROWS = {  # metric -> (label, digits)
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
    """Run the demo in `folder`; finished runs are not repeated.

    `steps` (default: the plan's) is per training, `seed` for both of them (weights, sample order,
    random draws). Returns the results and the path of report.html.

    Raises:
        ConfigError: if the folder holds runs with other settings.
    """
    from .jobs import run_plan
    from .plan import read_plan

    overrides = [] if steps is None else [f"training.max_steps={steps}"]
    plan = read_plan(PLAN, seeds=[seed], overrides=overrides)
    results = run_plan(plan, folder, resume=True, jobs=1, progress=progress)
    return results, publish(results, folder)


def table(results: Results) -> str:
    """Return the metrics of :data:`ROWS` and the step time of both variants, as text.

    The last column has the difference to the baseline with its 95 % interval, for metrics with
    per-image values; ▲ better or ▼ worse after the correction for all comparisons of the report,
    △ or ▽ if only the interval excludes zero.
    """
    from .statistics import compare

    runs = {run.variant: run for run in results.runs if run.status == "done"}
    cells = {(cell.variant, cell.metric): cell for cell in compare(results)}
    rows, differences = [["", *runs]], ["difference"]
    for metric, (label, digits) in ROWS.items():
        own = [cells.get((variant, metric)) for variant in runs]
        values = [
            f"{cell.mean:.{digits}f}" if cell and cell.mean is not None else "" for cell in own
        ]
        last = cells.get(("lgvq", metric))
        found, difference = last.to("baseline") if last else None, ""
        if last and found and found.low is not None:
            low, high = f"{found.low:+.{digits}f}", f"{found.high:+.{digits}f}"
            difference = f"{found.value:+.{digits}f} [{low}, {high}]{last.mark('baseline')}"
        if any(values):
            rows.append([label, *values])
            differences.append(difference)
    times = [run.cost.get("seconds_per_step") for run in runs.values()]
    rows.append(["seconds per step", *("" if t is None else f"{t:.3f}" for t in times)])
    width = max(map(len, text_table(rows).splitlines()))
    lines = zip(text_table(rows).splitlines(), [*differences, ""], strict=True)
    return "\n".join(f"{line:<{width}}  {difference}".rstrip() for line, difference in lines)


def main(argv: list[str]) -> int:
    """Run `lgvq demo`; return 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="lgvq demo",
        description="Train a VQ-VAE with and without LG-VQ on embedded scenes, and compare them. "
        "An interrupted demo is resumed by the same command.",
    )
    default: Any = {"help": "default: %(default)s"}
    parser.add_argument("-o", "--out", default="lgvq-demo", metavar="DIR", **default)
    parser.add_argument("--steps", type=int, metavar="N", help="steps per training")
    parser.add_argument("--seed", type=int, default=0, metavar="N", **default)
    parser.add_argument("--no-progress", action="store_true", help="hide the progress bar")
    args = parser.parse_args(argv)
    for name, minimum in (("steps", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name} must be a whole number >= {minimum}, got {value}")
    require_writable(Path(args.out))
    start = time.perf_counter()
    results, page = demo(
        Path(args.out), steps=args.steps, seed=args.seed, progress=not args.no_progress
    )
    print(table(results))
    failed = [run for run in results.runs if run.status != "done"]
    for run in failed:
        print(f"{run.variant}: {run.status}: {run.reason}")
    minutes = (time.perf_counter() - start) / 60
    print(
        "\n95 % intervals over test images, of one training each; other seeds give other numbers."
        "\n▲ better, ▼ worse (false discovery rate 5 %); △ ▽ only the interval excludes zero."
        f"\nReport: {page} ({minutes:.1f} min)"
    )
    return int(bool(failed))
