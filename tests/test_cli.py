"""`lgvq` as a user meets it: help, exit codes, one clear message."""

import importlib
import json
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


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert {*cli.COMMANDS} <= {*capsys.readouterr().out.split()}


HOST = """
model:
  learning_rate: 1e-3
  target: lgvq_plugin.hosts.vqvae.VQVAE
  params: {lossconfig: {target: lgvq_plugin.LGVQLoss, params: {lgvq: {ramp: 5}}}}
data: {batch_size: 4, train: {target: scenes}}
training: {max_steps: 2}
"""
HEAVY = ["torch", "numpy", "lightning", "pytorch_lightning", "taming", "PIL", "matplotlib", "scipy"]
LIGHT_ERRORS = {  # arguments -> what the message names
    "": "command",
    "trian": "trian",
    "train": "-b",
    "train -b nope.yaml": "nope.yaml",
    "train -b broken.yaml": "broken.yaml:2",
    "train -b ok.yaml --nmae x": "--nmae",
    "train -b ok.yaml training.max_stps=4": "max_steps",
    "train -b ok.yaml data.train.target=scens": "scenes",
    "train -b ok.yaml model.params.lossconfig.params.lgvq.rmp=4": "lgvq.rmp",
    "train -b ok.yaml --resume nowhere": "nowhere",
    "train -b ok.yaml --name old": "holds a run already",
    "retrofit -o x": "--ckpt",
    "retrofit -b ok.yaml --ckpt no.ckpt -o x": "no.ckpt",
    "retrofit -b nope.yaml --ckpt old.ckpt -o x": "nope.yaml",
    "eval": "--ckpt",
    "eval --ckpt no.ckpt": "no.ckpt",
    "eval --ckpt old.ckpt -b nope.yaml": "nope.yaml",
    "eval --ckpt old.ckpt --metrics psn": "psnr",
    "ablate": "-b",
    "ablate -b nope.yaml": "nope.yaml",
    "ablate -b ok.yaml": "'model'",
    "ablate -b ok.yaml --report": "results.json",
    "demo --steps 0": "--steps",
    "inspect --ckpt no.ckpt -o x": "no.ckpt",
    "inspect --ckpt old.ckpt -o x -b nope.yaml": "nope.yaml",
    "inspect --ckpt old.ckpt -o x --guide opn_clip": "open_clip",
    "export --ckpt no.ckpt --format host -o x": "no.ckpt",
    "export --ckpt old.ckpt --format hist -o x": "hist",
    "export --ckpt old.ckpt --format host -o x --push a/b": "--push",
    "data": "check|convert",
    "data check nowhere": "nowhere does not exist",
    "data check . --as cocoo": "coco",
    "data check . --guide opn_clip": "open_clip",
    "data convert logs x --format zip": "zip",
    "data convert logs x --size 0": "size",
    "cache": "-b",
    "cache -b nope.yaml": "nope.yaml",
    "cache -b ok.yaml --maskings -1": "--maskings",
    "cache -b ok.yaml training.max_stps=4": "max_steps",
    "doctor --fulll": "--fulll",
}


@pytest.mark.slow
def test_help_and_errors_in_arguments_and_configs_need_no_torch(tmp_path):
    """Importing torch and Lightning takes ten seconds of CPU; a typing error must not."""
    (tmp_path / "ok.yaml").write_text(HOST)
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "old.ckpt").write_bytes(b"never opened")
    (tmp_path / "logs" / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "old" / "checkpoints" / "last.ckpt").touch()
    code = """
import contextlib, io, json, sys
from lgvq_plugin import cli
found = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        try:
            status = cli.main(line.split())
        except SystemExit as stop:
            status = stop.code
    imported = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found.append([line, status, said.getvalue(), imported])
print(json.dumps(found))
"""
    helps = ["--help", "data check --help", "data convert --help"]
    helps += [f"{name} --help" for name in cli.COMMANDS]
    words = [sys.executable, "-c", code, json.dumps([*helps, *LIGHT_ERRORS]), json.dumps(HEAVY)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert len(found) == len(helps) + len(LIGHT_ERRORS)
    for line, status, said, imported in found:
        assert not imported, f"`lgvq {line}` imports {imported}"
        assert "Traceback" not in said, said
        assert (status or 0) == (2 if line in LIGHT_ERRORS else 0), f"`lgvq {line}`: {said}"
        assert LIGHT_ERRORS.get(line, "usage") in said, f"`lgvq {line}`: {said}"


@pytest.mark.slow
def test_the_script_sees_the_working_folder_as_python_m_does(tmp_path):
    """Inside a checkout of taming `lgvq` must find what `python -m lgvq_plugin` finds."""
    (tmp_path / "taming" / "models").mkdir(parents=True)
    (tmp_path / "taming" / "models" / "vqgan.py").write_text("class GumbelVQ: ...")
    script = tmp_path / "bin" / "lgvq"  # as pip writes it: its own folder is on the path
    script.parent.mkdir()
    script.write_text("import sys\nfrom lgvq_plugin.cli import main\nsys.exit(main())\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(script), "doctor", "--json"]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    reason = [f["told"] for f in json.loads(shown.stdout) if f["what"] == "taming"]
    assert reason[0].startswith(f"clone at {tmp_path / 'taming'}"), reason


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


def test_version_is_reported(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["-V"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("lgvq ")


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (None, 0, ""),
        (ConfigError("no such thing"), 2, "lgvq: error: no such thing"),
        (KeyboardInterrupt(), 130, "--resume auto"),
        (KeyboardInterrupt("stopped at step 3"), 130, "lgvq: stopped at step 3"),
        (RuntimeError("ours"), 1, "lgvq: failed: RuntimeError: ours"),
        (BrokenPipeError(), 1, "lgvq: the output was closed before its end"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, reason):
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
    assert capsys.readouterr().err.strip().endswith(reason)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_can_be_called(name):
    module, _, function = cli.COMMANDS[name][0].partition(":")
    assert callable(getattr(importlib.import_module(f"lgvq_plugin.{module}"), function))


@pytest.mark.slow
def test_a_run_from_the_command_line_is_resumed(tmp_path, monkeypatch, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model:\n  learning_rate: 1e-3\n  target: lgvq_plugin.hosts.vqvae.VQVAE\n"
        "  params: {n_embed: 8, embed_dim: 4, channels: 8, num_res_blocks: 1, downsample: 4,\n"
        "    lossconfig: {target: lgvq_plugin.hosts.vqvae.VQVAELoss}}\n"
        "data: {batch_size: 4, train: {target: scenes, params: {size: 16, length: 9}}}\n"
        "training: {max_steps: 2, accelerator: cpu, log_every: 1, images_every: null}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "-b", str(config)]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.endswith("_tiny")
    again = ["train", "-b", str(config), "--resume", "auto", "training.max_steps=3"]
    assert cli.main(again) == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [run.name]
    steps = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3"]
    assert cli.main(["train", "-b", str(config), "--name", run.name]) == 2
    assert "holds a run already" in capsys.readouterr().err


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
    reason = capsys.readouterr().err
    assert "lgvq: error: " in reason
    assert "file" in reason
    assert "a file, where a folder is needed" in reason
    assert "Traceback" not in reason
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_permission_is_2(monkeypatch, capsys):
    def refuse(argv):
        raise PermissionError(13, "Permission denied", "/runs/a")

    module = importlib.import_module("lgvq_plugin.bench.demo")
    monkeypatch.setattr(module, "main", refuse)
    assert cli.main(["demo"]) == 2
    assert "'/runs/a': Permission denied" in capsys.readouterr().err


def test_ctrl_c_during_an_import_ends_at_once_though_the_import_drops_it(tmp_path):
    (tmp_path / "slow_command.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        "    pass\n"
        "def main(argv): return 0\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lgvq_plugin import cli;"
        "cli.COMMANDS['train'] = ('x:main', '');"
        "cli.importlib.import_module = lambda name: __import__('slow_command');"
        "sys.exit(cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "lgvq: interrupted; nothing was started\n"


@pytest.mark.parametrize(("module", "extra"), [("torchmetrics", "bench"), ("lightning", "train")])
def test_a_missing_extra_is_reported_with_the_command_that_installs_it(
    module, extra, monkeypatch, capsys
):
    def main(argv):
        raise ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.text")

    monkeypatch.setattr("lgvq_plugin.bench.evaluate.main", main)
    assert cli.main(["eval"]) == 2
    shown = capsys.readouterr().err
    assert shown.endswith(f"is not installed: pip install 'lgvq_plugin[{extra}]'\n")
    assert "Traceback" not in shown
