"""What flows through an ablation; every record is written once, here.

YAML --plan--> Plan of Jobs --run--> Results of Runs --statistics--> Cells --report--> one page
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from ..config import require, verify
from ..files import write_json
from ..sockets import ConfigError

# In the folder of an ablation:
RESULTS, SUMMARY, REPORT = "results.json", "summary.json", "report.html"
VALUES, DIFFERENCES = "values.csv", "differences.csv"
JOB, RUN, LOG = "job.json", "run.json", "log.txt"  # in the folder of a job
EVALUATING = "evaluating {}"  # in the log of a job, when its training is done
CONFIDENCE = 0.95
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its evaluation.

    Args:
        data: name of the data set, "" where the plan has only one.
        variant: name of the variant.
        seed: of the training; it gives the weights and the order of the samples.
        config: what `lgvq train` reads, in plain containers.
        evaluation: keywords of the evaluation.
        examples: number of images whose reconstructions are kept.
    """

    data: str
    variant: str
    seed: int
    config: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    examples: int = 8

    @property
    def name(self) -> str:
        """Folder below the ablation's.

        Example:
            >>> Job(data="", variant="all", seed=1, config={}).name
            'all/seed_1'
        """
        return "/".join(part for part in (self.data, self.variant, f"seed_{self.seed}") if part)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole ablation.

    Args:
        title: of the report.
        references: variants that the others are compared to; the first is *the* baseline.
        variants: name -> {"note": str, "changes": plain overrides}.
        jobs: every combination of data set, variant and seed.
    """

    title: str
    references: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    jobs: tuple[Job, ...]


class _Number(TypedDict):
    value: float | None


class Metric(_Number, total=False):
    """A row of an evaluation: the mean of `per_image`, where it is one, over `n` things."""

    n: int | None
    unit: str | None
    higher_is_better: bool | None
    per_image: list[float] | None
    settings: dict[str, Any] | None


class Evaluation(TypedDict, total=False):
    """What `evaluate` returned."""

    settings: dict[str, Any]
    environment: dict[str, Any] | None
    metrics: dict[str, Metric]
    skipped: dict[str, str]


class Cost(TypedDict, total=False):
    """What a training took; the step's time and the memory are None where they were not taken."""

    steps: int
    seconds_per_step: float | None
    peak_memory_mib: float | None
    memory_of: str
    device: str


class _Pictures(TypedDict):
    original: str
    reconstruction: str


class Example(_Pictures, total=False):
    """PNG paths below the ablation's folder, and what the image shows."""

    caption: str


class Variant(TypedDict, total=False):
    """What the report says of a variant."""

    note: str
    changes: Any
    config: Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one job.

    Args:
        status: done, failed or missing (not run yet).
        reason: why it is not done; "" if it is.
        evaluation: what `evaluate` returned.
        curves: log key -> list of (step, value).
        cost: of the training.
        examples: images and their reconstructions.
    """

    data: str
    variant: str
    seed: int
    status: Literal["done", "failed", "missing"] = "done"
    reason: str = ""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation())
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    cost: Cost = field(default_factory=lambda: Cost())
    examples: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, curve in self.curves.items():
            for i, point in enumerate(curve):
                require(len(point) == 2, f"curves.{name}[{i}]", "2 values, step and value", point)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of a run that is done."""
        return self.evaluation.get("metrics", {}) if self.status == "done" else {}


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs of a plan; `results.json` holds it."""

    title: str
    references: tuple[str, ...]
    variants: dict[str, Variant]
    runs: tuple[Run, ...]

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets, in the order of the plan."""
        return list(dict.fromkeys(run.data for run in self.runs))

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if there is no such file or it holds something else, by its key.
        """
        found = read_record(path, cls)
        runs = tuple(
            _built(Run, run, f"{path}: runs[{i}].")  # type: ignore[arg-type]
            for i, run in enumerate(found.runs)
        )
        results = replace(found, references=tuple(found.references), runs=runs)
        known = f"one of {', '.join(results.variants)}"
        require(bool(results.references), f"{path}: references", known, [])
        for i, name in enumerate(results.references):
            require(name in results.variants, f"{path}: references[{i}]", known, name)
        places = set()
        for i, run in enumerate(runs):
            require(
                run.variant in results.variants, f"{path}: runs[{i}].variant", known, run.variant
            )
            place = run.data, run.variant, run.seed
            once = "one run of each data set, variant and seed"
            require(place not in places, f"{path}: runs[{i}]", once, place)
            places.add(place)
        return results


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A variant minus its reference, paired.

    Args:
        value: mean difference over the seeds that both have.
        low, high: ends of the 95 % interval; None where there is nothing to resample.
        paired_by: "images and seeds", "images" (one seed) or "seeds".
        seeds, images: how many of each were paired; images is None for pairing by seeds.
        verdict: better or worse where the interval excludes zero, else "".
    """

    reference: str
    value: float
    low: float | None
    high: float | None
    paired_by: str
    seeds: int
    images: int | None
    verdict: Literal["better", "worse", ""]


MARKS = {"better": " ▲", "worse": " ▼", "": ""}
"""How a table shows a verdict."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One metric of one variant on one data set.

    Args:
        values: of every seed that is done.
        mean, sd: over the seeds; sd is None for fewer than two, mean for none.
        images: that the metric was computed on.
        differences: to every reference but itself.
    """

    data: str
    variant: str
    metric: str
    unit: str
    higher_is_better: bool | None
    values: dict[int, float]
    mean: float | None
    sd: float | None
    images: int | None
    differences: tuple[Difference, ...] = ()

    def to(self, reference: str) -> Difference | None:
        """Return the difference to `reference`, if there is one."""
        return next((d for d in self.differences if d.reference == reference), None)


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean, and the standard deviation of a sample (None for fewer than two values).

    Example:
        >>> mean_and_sd([1.0, 3.0])
        (2.0, 1.4142135623730951)
        >>> mean_and_sd([])
        (None, None)
    """
    if not len(values):
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or min(values) == max(values):
        return mean, None if len(values) < 2 else 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        ConfigError: if there is no such file or it is no JSON mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {str(path)!r}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON mapping, got {type(value).__name__}")
    return value


def read_record(path: Path, cls: type[T]) -> T:
    """Read a JSON file that holds a dataclass.

    Raises:
        ConfigError: if there is no such file, or a key is missing, unknown or of another type.
    """
    value = read_json(path)
    try:
        verify(value, cls, "")
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {str(error).removeprefix(': ')}; the file was changed, or written by "
            "another version"
        ) from error
    return _built(cls, value, f"{path}: ")


def _built(cls: type[T], value: dict[str, Any], where: str) -> T:
    try:
        return cls(**value)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error


def example_file(root: Path, path: str) -> Path:
    """Return the file of an example, which is a picture below `root`.

    Raises:
        ConfigError: if it is not.
    """
    from PIL import Image

    file = root / path
    key = f"examples: {path!r}"
    inside = "\0" not in path and file.resolve().is_relative_to(root.resolve())
    require(inside, key, f"a path below {str(root)!r}", path)
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{key}: cannot be read as a PNG file: {error}") from error
    return file


def summary(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return results and differences without values by image and curves: small enough to commit.

    Args:
        results: of all runs.
        cells: what `statistics.compare` says of them.
    """
    runs = []
    for run in results.runs:
        metrics = {
            name: {key: row.get(key) for key in ("value", "n", "unit", "higher_is_better")}
            for name, row in run.metrics.items()
        }
        told = {key: getattr(run, key) for key in ("data", "variant", "seed", "status", "reason")}
        runs.append({**told, "cost": run.cost, "metrics": metrics})
    done = next((run for run in results.runs if run.status == "done"), None)
    differences = [
        {"data": cell.data, "variant": cell.variant, "metric": cell.metric, **asdict(one)}
        for cell in cells
        for one in cell.differences
    ]
    return {
        "title": results.title,
        "references": list(results.references),
        "variants": {
            name: {key: told.get(key) for key in ("note", "changes")}
            for name, told in results.variants.items()
        },
        "environment": done.evaluation.get("environment") if done else None,
        "runs": runs,
        "differences": differences,
    }
