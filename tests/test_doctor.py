"""The report on installations that are broken in the ways users report."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lgvq_plugin import cli, compat, doctor


def problems(found):
    return [finding for finding in found if finding.level == "problem"]


def clone(root, main_import=False):
    """A clone of taming as commit 3ba01b2 lays it out: no __init__.py anywhere."""
    models = root / "taming" / "models"
    models.mkdir(parents=True)
    line = "from main import instantiate_from_config\n" if main_import else ""
    (models / "vqgan.py").write_text(f"{line}class GumbelVQ: ...\n")
    (root / "main.py").write_text("")
    return root


@pytest.fixture
def only_path(monkeypatch):
    """Make the given folders all of the path; taming is looked for there alone."""

    def set_path(*folders):
        for name in [n for n in sys.modules if n.split(".")[0] == "taming"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])
        monkeypatch.setattr(compat, "version_of", lambda name: None)

    return set_path


def test_the_machine_that_runs_the_tests_has_all_it_needs(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch             {metadata.version('torch')}" in out
    assert "guide micro_clip  embedded" in out
    assert "no problem found" in out


def test_json_for_programs(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"level", "what", "told", "command"} == set(found[0])
    assert "taming" in [finding["what"] for finding in found]


def test_no_taming(only_path, tmp_path):
    only_path(tmp_path)
    (finding,) = problems(doctor.taming())
    assert finding.command == "pip install taming-transformers"


def test_a_clone_that_pip_installed_without_its_files(only_path, tmp_path, monkeypatch):
    only_path(tmp_path)
    monkeypatch.setattr(
        compat, "version_of", lambda name: "0.0.1" if name == "taming-transformers" else None
    )
    (finding,) = problems(doctor.taming())
    assert "without its files" in finding.told
    assert finding.command == compat.TAMING_CLONE  # no editable install says where the files are
    monkeypatch.setattr(doctor, "_source_of", lambda name: "/home/me/taming-transformers")
    (finding,) = problems(doctor.taming())
    assert finding.command == "export PYTHONPATH=/home/me/taming-transformers:$PYTHONPATH"


def test_a_clone_is_told_from_a_wheel(only_path, tmp_path):
    only_path(clone(tmp_path / "clone", main_import=True))
    (finding,) = doctor.taming()
    assert finding.level == "ok"
    assert finding.told.startswith(f"clone at {tmp_path / 'clone' / 'taming'}")
    assert "VectorQuantizer2: no, GumbelVQ: yes" in finding.told


def test_a_clone_is_used_before_the_wheel_wherever_it_is_on_the_path(
    only_path, tmp_path, monkeypatch
):
    wheel = tmp_path / "site-packages"
    (wheel / "taming" / "models").mkdir(parents=True)
    (wheel / "taming" / "__init__.py").write_text("")
    own = clone(tmp_path / "clone")
    only_path(wheel, own)
    monkeypatch.setattr(
        compat, "version_of", lambda name: "0.0.1" if name == "taming-transformers" else None
    )
    (finding,) = doctor.taming()
    assert finding.level == "ok"
    assert f"clone at {own / 'taming'}, used before taming-transformers 0.0.1" in finding.told


def test_what_a_clone_s_main_lacks_is_one_command(only_path, tmp_path):
    root = clone(tmp_path / "clone", main_import=True)
    (root / "main.py").write_text(
        "import os\nimport no_such_a, os.path\nfrom no_such_b.c import d\n"
    )
    only_path(root, *sys.path)
    (finding,) = problems(doctor.taming())
    assert finding.command == "pip install no_such_a no_such_b"


def test_latent_diffusion_over_the_wheel_of_taming(only_path, tmp_path):
    wheel = tmp_path / "site-packages"
    (wheel / "taming").mkdir(parents=True)
    (wheel / "taming" / "__init__.py").write_text("")
    (tmp_path / "latent" / "ldm").mkdir(parents=True)
    only_path(wheel, tmp_path / "latent")
    (finding,) = problems(doctor.taming())
    assert "VectorQuantizer2" in finding.told
    assert finding.command.startswith("git clone https://github.com/CompVis/taming-transformers")


def test_the_exit_code_says_whether_there_is_a_problem(monkeypatch, capsys):
    note = doctor.Finding("note", "LPIPS", "downloaded at first use", "get it")
    monkeypatch.setattr(doctor, "examine", lambda full: [note])
    assert cli.main(["doctor"]) == 0
    problem = doctor.Finding("problem", "torch", "not installed", "pip install torch")
    monkeypatch.setattr(doctor, "examine", lambda full: [note, problem])
    assert cli.main(["doctor"]) == 1
    assert cli.main(["doctor", "--json"]) == 1
    assert "pip install torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "is_problem"), [("2.5.1", True), ("2.6.0", False), ("2.14.1+cpu", False)]
)
def test_old_versions_and_what_mends_them(monkeypatch, version, is_problem):
    monkeypatch.setattr(compat, "version_of", lambda name: version if name == "torch" else "99.0")
    found = problems(doctor.stack())
    assert [f.command for f in found] == (["pip install 'torch>=2.6'"] if is_problem else [])


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(compat, "version_of", lambda name: None)
    found = doctor.stack()
    assert {f.what for f in problems(found)} == {w.partition(">=")[0] for w in doctor.required()}
    assert {f.what for f in found if f.level == "note"} == set(doctor.EXTRAS)
    assert all(f.command for f in found if f.level != "ok")


def test_what_is_required_is_what_pyproject_declares():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    declared = {*project["dependencies"], *extras["train"], *extras["bench"]}
    assert {*doctor.required()} == declared - {"taming-transformers", "lgvq_plugin[train]"}


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("driver on fire")

    broken.__name__ = "devices"
    monkeypatch.setattr(doctor, "devices", broken)
    found = problems(doctor.examine())
    assert [(f.what, f.told) for f in found] == [("devices", "RuntimeError: driver on fire")]


def test_guide_weights_and_lpips_are_found_where_they_lie(monkeypatch, tmp_path):
    import huggingface_hub
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    levels = {f.what: f.level for f in doctor.weights()}
    assert levels == {"guide open_clip": "note", "guide micro_clip": "ok", "LPIPS": "note"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: "/there")
    assert {f.level for f in doctor.weights()} == {"ok"}


def test_a_broken_import_names_its_command(monkeypatch):
    def fail(name):
        if name == "taming.models.vqgan":
            raise ModuleNotFoundError("No module named 'requests'", name="requests")

    monkeypatch.setattr(doctor, "import_module", fail)
    monkeypatch.setattr(compat, "patch", dict)
    (finding,) = problems(doctor.imports())
    assert finding.command == "pip install requests"
