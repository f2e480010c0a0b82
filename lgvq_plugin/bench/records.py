"""The records of an ablation, and the files that hold them.

plan.py: YAML -> Plan of Jobs; jobs.py: Plan -> Results of Runs; statistics.py: Results -> Cells;
report.py: Results and Cells -> report.html, report.md and tables
"""

import csv
import io
import json
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
EVALUATING = "evaluating {}"  # in the log of a job, once its training is done
CONFIDENCE = 0.95
Verdict = Literal["better", "worse", ""]
MARKS = {"better": " ▲", "worse": " ▼", "": ""}  # verdicts in tables
FAINT_MARKS = {True: " △", False: " ▽"}  # the interval alone says better, or worse
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its evaluation."""

    data: str  # name of the data set; "" if the plan has only one
    variant: str
    seed: int  # of the training: initialization and sample order
    config: dict[str, Any]  # training config, in plain containers
    evaluation: dict[str, Any] = field(default_factory=dict)  # keyword arguments of `evaluate`
    examples: int = 8  # number of images whose reconstructions are kept

    @property
    def name(self) -> str:
        """Folder of the job, relative to the ablation's: `[DATA/]VARIANT/seed_N`."""
        return "/".join(part for part in (self.data, self.variant, f"seed_{self.seed}") if part)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole ablation: every combination of data set, variant and seed."""

    title: str
    references: tuple[str, ...]  # the others are compared to them; the first one is the baseline
    variants: dict[str, dict[str, Any]]  # name -> {"note": str, "changes": overrides}
    jobs: tuple[Job, ...]


class _Value(TypedDict):
    value: float | None


class Metric(_Value, total=False):
    """A row of an evaluation; `per_image` is given where `value` is the mean over `n` images."""

    n: int | None
    unit: str | None
    higher_is_better: bool | None
    per_image: list[float] | None
    settings: dict[str, Any] | None


class Evaluation(TypedDict, total=False):
    """The return value of `evaluate`."""

    settings: dict[str, Any]
    environment: dict[str, Any] | None
    metrics: dict[str, Metric]
    skipped: dict[str, str]


class Cost(TypedDict, total=False):
    """Cost of a training; step time and memory are None if they were not measured."""

    steps: int
    seconds_per_step: float | None
    peak_memory_mib: float | None
    memory_of: str
    device: str


class _Pictures(TypedDict):
    original: str
    reconstruction: str


class Example(_Pictures, total=False):
    """Paths of two PNG files, relative to the ablation's folder, and the image's caption."""

    caption: str


class Variant(TypedDict, total=False):
    """What the report shows of a variant."""

    note: str
    changes: Any
    config: Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of one job."""

    data: str
    variant: str
    seed: int
    status: Literal["done", "failed", "missing"] = "done"  # missing: not run yet
    reason: str = ""  # why the job is not done
    evaluation: Evaluation = field(default_factory=lambda: Evaluation())
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # key -> [[step, value]]
    cost: Cost = field(default_factory=lambda: Cost())
    examples: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, curve in self.curves.items():
            for i, point in enumerate(curve):
                require(len(point) == 2, f"curves.{name}[{i}]", "2 values, step and value", point)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics; {} unless the run is done."""
        return self.evaluation.get("metrics", {}) if self.status == "done" else {}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Originals and reconstructions of the same images."""

    rows: dict[str, list[str]]  # paths of the originals, then those of each variant
    captions: list[str]  # of each image
    seeds: list[int]  # of the trainings


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs of a plan, stored in results.json."""

    title: str
    references: tuple[str, ...]
    variants: dict[str, Variant]
    runs: tuple[Run, ...]

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets, in the order of the plan."""
        return list(dict.fromkeys(run.data for run in self.runs))

    def examples(self, data: str) -> "Examples | None":
        """Return the examples of each variant's first run on a data set that has any."""
        found = {r.variant: r for r in reversed(self.runs) if r.data == data and r.examples}
        runs = {name: found[name] for name in self.variants if name in found}
        if not runs:
            return None
        first = next(iter(runs.values())).examples
        rows = {"original": [each["original"] for each in first]}
        rows |= {name: [each["reconstruction"] for each in r.examples] for name, r in runs.items()}
        columns = min(map(len, rows.values()))
        return Examples(
            rows={name: paths[:columns] for name, paths in rows.items()},
            captions=[each.get("caption", "") for each in first[:columns]],
            seeds=sorted({run.seed for run in runs.values()}),
        )

    def save(self, path: Path) -> None:
        """Write the results atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if the file is missing or a value is wrong; the message names its key.
        """
        found = read_record(path, cls)
        at = [f"{path}: runs[{i}]" for i in range(len(found.runs))]
        given: Any = zip(at, found.runs, strict=True)
        runs = [_build(Run, values, f"{where}.") for where, values in given]
        known = f"one of {', '.join(found.variants)}"
        require(bool(found.references), f"{path}: references", known, [])
        for i, name in enumerate(found.references):
            require(name in found.variants, f"{path}: references[{i}]", known, name)
        places = set()
        for where, run in zip(at, runs, strict=True):
            require(run.variant in found.variants, f"{where}.variant", known, run.variant)
            place = run.data, run.variant, run.seed
            require(place not in places, where, "one run per data set, variant and seed", place)
            places.add(place)
        return replace(found, references=tuple(found.references), runs=tuple(runs))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference of a variant and a reference."""

    reference: str
    value: float  # mean of variant - reference over the seeds that both have
    low: float | None  # 95 % interval of this comparison alone; None for a single pair
    high: float | None
    paired_by: str  # "images and seeds", "images" (one seed) or "seeds"
    seeds: int  # number of pairs
    images: int | None  # None if paired by seeds
    verdict: Verdict  # after the correction for all comparisons of the report
    p: float | None = None  # two-sided, of this comparison alone; None without interval
    p_adjusted: float | None = None  # of Benjamini and Hochberg; None if not counted

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval of this comparison alone."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One metric of one variant on one data set."""

    data: str
    variant: str
    metric: str
    unit: str
    higher_is_better: bool | None  # None: a control
    values: dict[int, float]  # seed -> value, for every seed that is done
    mean: float | None  # None without seeds
    sd: float | None  # None for fewer than two seeds
    images: int | None  # number of images that the metric was computed on
    differences: tuple[Difference, ...] = ()  # one per reference other than the variant

    def to(self, reference: str) -> Difference | None:
        """Return the difference to `reference`, or None."""
        return next((d for d in self.differences if d.reference == reference), None)

    def mark(self, reference: str) -> str:
        """Return " ▲" or " ▼" for a verdict, " △" or " ▽" if only the interval excludes zero."""
        found = self.to(reference)
        if found is None or found.verdict or self.higher_is_better is None:
            return MARKS[found.verdict if found else ""]
        if not found.excludes_zero:
            return ""
        return FAINT_MARKS[(found.value > 0) == self.higher_is_better]


def read_json(path: Path) -> Any:
    """Read a JSON file; ConfigError if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {str(path)!r}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error


def read_record(path: Path, cls: type[T]) -> T:
    """Read a dataclass or TypedDict from a JSON file.

    Raises:
        ConfigError: if the file is missing or not JSON, or a key is missing, unknown or of the
            wrong type.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON mapping, got {type(value).__name__}")
    try:
        verify(value, cls, "")
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {str(error).removeprefix(': ')}; the file was changed, or written by "
            "another version"
        ) from error
    return _build(cls, value, f"{path}: ")


def _build(cls: type[T], value: dict[str, Any], where: str) -> T:
    try:
        return cls(**value)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns, the first to the left and all others to the right.

    Example:
        >>> print(text_table([["", "ms"], ["encoder", "1.5"], ["head", "12"]]))
                  ms
        encoder  1.5
        head      12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return CSV with a header; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()
