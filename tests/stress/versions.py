"""Run the core of the tests with the oldest and the newest packages that pyproject.toml admits.

    python tests/stress/versions.py [--oldest PYTHON3.10] [--newest PYTHON3.13] [--tests FILE ...]

Builds a virtual environment for each, in a folder that is removed after: the oldest with the lower
bounds as exact versions, the newest without bounds. Also runs pip-audit in the newest. Needs a
package index, some gigabytes and minutes.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = (
    *("tests/test_functional.py", "tests/test_alignment.py", "tests/test_config.py"),
    *("tests/test_encoder.py", "tests/heads", "tests/objectives", "tests/hosts/test_training.py"),
    *("tests/training/test_driver.py", "tests/training/test_resume.py", "tests/test_safe_load.py"),
)
EXTRAS = ("train", "test")
SHOWN = ("torch", "lightning", "open_clip_torch", "omegaconf", "numpy", "torchvision")


def lower_bounds(text: str) -> dict[str, str]:
    """Return package -> lowest version, of the plain dependencies and the extra `train`."""
    head, _, rest = text.partition("[project.optional-dependencies]")
    lines = head[head.index("dependencies = [") :] + rest[: rest.index("\nbench = [")]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', lines))


def run(*command: object, timeout: float = 3600) -> tuple[int, str]:
    """Run a command in the root of the checkout; return exit code and output."""
    words = [str(word) for word in command]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout + done.stderr


def try_environment(name: str, python: str, folder: Path, tests: list[str]) -> list[str]:
    """Build an environment and run the tests in it; return a row of the table."""
    code, output = run(python, "-m", "venv", folder)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q"]
    if code == 0 and name == "oldest":
        bounds = lower_bounds((ROOT / "pyproject.toml").read_text())
        pins = folder / "pins.txt"
        pins.write_text("".join(f"{each}=={lowest}\n" for each, lowest in bounds.items()))
        code, output = run(*pip, "-c", pins, "-e", f".[{','.join(EXTRAS)}]")
    elif code == 0:
        code, output = run(*pip, "-U", "-e", f".[{','.join(EXTRAS)}]")
    if code:
        return [name, python, "not installed", output.strip().splitlines()[-1]]
    show = (
        "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], "
        f"*(f'{{name}} {{v(name)}}' for name in {SHOWN!r}))"
    )
    _, versions = run(folder / "bin/python", "-c", show)
    _, output = run(folder / "bin/python", "-m", "pytest", "-p", "no:cacheprovider", *tests)
    print(output[-4000:])
    return [name, versions.strip(), output.strip().splitlines()[-1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oldest", default="python3.10", metavar="PYTHON")
    parser.add_argument("--newest", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--tests", nargs="+", default=[*CORE], metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = [
            try_environment(name, python, Path(place) / name, given.tests)
            for name, python in (("oldest", given.oldest), ("newest", given.newest))
        ]
        python = Path(place) / "newest/bin/python"
        code, output = run(python, "-m", "pip", "install", "-q", "pip-audit")
        if code == 0:
            code, output = run(
                python, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off"
            )
        unknown = output.count("could not be audited")  # all of them without PyPI's JSON interface
        verdict = f"exit code {code}, {unknown} packages could not be audited"
        lines = [line for line in output.strip().splitlines() if "could not be audited" not in line]
        rows.append(["pip-audit", verdict, "\n".join(lines)[-2000:]])
    for row in rows:
        print(" | ".join(row))
    return int(any("failed" in row[-1] or "not installed" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
