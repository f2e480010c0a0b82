"""The other package called `taming`: the contract again, in a process where it comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "taming-transformers-rom1504==0.0.6"
CASES = 4


@pytest.fixture(scope="module")
def rom1504(tmp_path_factory):
    """A folder with the package: LGVQ_ROM1504 if set, else fetched by pip."""
    known = os.environ.get("LGVQ_ROM1504")
    folder = Path(known) if known else tmp_path_factory.mktemp("rom1504")
    if not known:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        done = subprocess.run([*command, str(folder), NAME], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"pip cannot fetch {NAME} (offline?): {done.stderr.strip()[-200:]}")
    if not (folder / "taming" / "models" / "vqgan.py").is_file():
        pytest.skip(f"no taming in {folder}")
    return folder


CORE = "a_step_changes or weights_of_zero or disabled or state_dicts or optimizer or encode"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "count"),
    [(CORE, 6), pytest.param("", 10, marks=pytest.mark.extended)],
    ids=["core", "all"],
)
def test_its_hosts_keep_the_contract(rom1504, tests, count):
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "LGVQ_TEST_TAMING": "rom1504",
        "PYTHONPATH": f"{rom1504}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    code = "import taming, sys; print(taming.__path__[0])"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(rom1504 / "taming")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, str(here / "test_contract.py"), "-k", tests],
        env=environment,
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(".") >= count * CASES
