"""`lgvq` as a user meets it: help, exit codes, one clear message."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgvq_plugin import cli
from lgvq_plugin.sockets import ConfigError

ROOT = Path(__file__).parents[1]


def lgvq(*argv, cwd=None):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lgvq_plugin", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_help_lists_the_commands():
    shown = lgvq("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.COMMANDS)


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, lgvq_plugin.cli; print({'torch', 'lightning', 'omegaconf'} & {*sys.modules})"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert shown.stdout.strip() == "set()", shown.stderr


def test_wrong_input_is_one_line_and_2():
    shown = lgvq("train", "-b", "nowhere.yaml")
    assert shown.returncode == 2
    assert shown.stderr.startswith("lgvq: error: config 'nowhere.yaml' does not exist")
    assert "Traceback" not in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("argv", [["--debug", "train"], ["train", "--debug"]])
def test_debug_shows_where(argv, capsys):
    assert cli.main([*argv, "-b", "nowhere.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train"], ["train", "-b", "a.yaml", "--nmae", "x"], ["--wat"]]
)
def test_what_cannot_be_parsed_is_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "lgvq" in capsys.readouterr().err


def test_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["-V"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("lgvq ")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, ""),
        (ConfigError("no such thing"), 2, "lgvq: error: no such thing"),
        (KeyboardInterrupt(), 130, "--resume auto"),
        (KeyboardInterrupt("stopped at step 3"), 130, "lgvq: stopped at step 3"),
        (RuntimeError("ours"), 1, "lgvq: failed: RuntimeError: ours"),
        (BrokenPipeError(), 1, "lgvq: the output was closed before its end"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, told):
    def command(argv):
        assert argv == ["a", "--b"]
        if error is not None:
            raise error
        return 0

    monkeypatch.setitem(cli.COMMANDS, "train", ("fake:main", ""))
    fake = type(sys)("lgvq_plugin.fake")
    fake.main = command
    monkeypatch.setitem(sys.modules, "lgvq_plugin.fake", fake)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a closed one is replaced
    assert cli.main(["train", "a", "--b"]) == code
    assert capsys.readouterr().err.strip().endswith(told)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_can_be_called(name):
    module, _, function = cli.COMMANDS[name][0].partition(":")
    assert callable(getattr(importlib.import_module(f"lgvq_plugin.{module}"), function))


def test_a_run_from_the_command_line_goes_on(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model:\n  learning_rate: 1e-3\n  target: lgvq_plugin.hosts.vqvae.VQVAE\n"
        "  params: {n_embed: 8, embed_dim: 4, channels: 8, num_res_blocks: 1, downsample: 4,\n"
        "    lossconfig: {target: lgvq_plugin.hosts.vqvae.VQVAELoss}}\n"
        "data: {batch_size: 4, train: {target: scenes, params: {size: 16, length: 9}}}\n"
        "training: {max_steps: 2, accelerator: cpu, log_every: 1, images_every: null}\n"
    )
    first = lgvq("train", "-b", str(config), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.endswith("_tiny")
    again = ["train", "-b", str(config), "--resume", "auto", "training.max_steps=3"]
    second = lgvq(*again, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [run.name]
    steps = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3"]
    clash = lgvq("train", "-b", str(config), "--name", run.name, cwd=tmp_path)
    assert clash.returncode == 2
    assert "holds a run already" in clash.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "-b", "CONFIG", "--logdir", "file", "--name", "a"],
        ["eval", "-b", "CONFIG", "--ckpt", "x.ckpt", "-o", "file/out"],
        ["eval", "-b", "CONFIG", "--ckpt", "x.ckpt", "--json", "file/r.json"],
        ["export", "--ckpt", "x.ckpt", "--format", "heads", "-o", "file/out"],
        ["inspect", "--ckpt", "x.ckpt", "-o", "file/out"],
        ["cache", "-b", "CONFIG", "-o", "file/out"],
        ["ablate", "-b", "PLAN", "-o", "file/out"],
        ["demo", "-o", "file/out"],
        ["data", "check", ".", "-o", "file/out"],
    ],
)
def test_a_file_where_a_folder_is_needed_is_2(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jpg").write_text("")
    (tmp_path / "a.txt").write_text("a dog")
    names = {"CONFIG": ROOT / "configs/vqvae_scenes_64.yaml", "PLAN": ROOT / "configs/none.yaml"}
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([str(names.get(word, word)) for word in argv]) == 2
    told = capsys.readouterr().err
    assert "lgvq: error: " in told
    assert "file" in told
    assert "a file, where a folder is needed" in told
    assert "Traceback" not in told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_permission_is_2(monkeypatch, capsys):
    def refuse(argv):
        raise PermissionError(13, "Permission denied", "/runs/a")

    module = importlib.import_module("lgvq_plugin.demo")
    monkeypatch.setattr(module, "main", refuse)
    assert cli.main(["demo"]) == 2
    assert "'/runs/a': Permission denied" in capsys.readouterr().err
