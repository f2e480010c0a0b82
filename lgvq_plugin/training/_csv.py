"""metrics.csv: one row per logged step; a resumed run goes on in the same file."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from .._files import replacing, writing


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`.

    Lightning's own CSVLogger deletes the file of the run before; this one drops only the rows
    after the step at which the run goes on.

    Args:
        folder: of the run.
        resumed_at: rows of later steps are dropped; 0 starts a new file.
    """

    def __init__(self, folder: Path, resumed_at: int = 0):
        super().__init__()
        self.path = folder / "metrics.csv"
        self._keys = ["step"]
        self._rows: list[dict[str, str]] = []
        if resumed_at > 0 and self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            # A kill or a full disk leaves half a row at the end.
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))
            rows = [row for row in reader if (row.get("step") or "").isdecimal()]
            self._rows = [row for row in rows if int(row["step"]) <= resumed_at]
            self._keys = list(reader.fieldnames or self._keys)
        self._is_behind = True  # the file has to be written as a whole before it grows

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Runs have no versions."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`; a row is on disk when the call returns."""
        row = {"step": str(step), **{key: f"{value:.8g}" for key, value in metrics.items()}}
        new = [key for key in row if key not in self._keys]
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1].update(row)
            self._is_behind = True
        else:
            self._rows.append(row)
        if new or self._is_behind:
            self._keys += new
            self._write_all()
            return
        with writing(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._keys, restval="").writerow(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Do nothing: the config lies beside the file."""

    def _write_all(self) -> None:
        with replacing(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._keys, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        self._is_behind = False
