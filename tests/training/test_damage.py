"""Damage that a run must survive, or refuse by name: not finite, tampered, truncated, disk full."""

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from lgvq_plugin import cli
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training import callbacks
from lgvq_plugin.training.run import Interrupted, train

EXTENDED = [pytest.mark.slow, pytest.mark.extended]
EVERY = ["training.max_steps=4", "training.checkpoint_every=1", "training.keep_checkpoints=null"]
LGVQ = [
    "model.params.lossconfig.target=lgvq_plugin.LGVQLoss",
    "model.params.lossconfig.params.lgvq.guide.use=micro_clip",
    "model.params.lossconfig.params.lgvq.stop=null",
    "model.params.lossconfig.params.lgvq.every=1",
]
SKIP = [*LGVQ, "model.params.lossconfig.params.lgvq.on_nonfinite=skip"]


def poison(monkeypatch, part, value, since, until=10**6):
    """From step `since` on, one gradient value of `part` is `value`."""
    from lgvq_plugin.training.driver import HostDriver

    inner = HostDriver.manual_backward

    def backward(self, loss, *args, **kwargs):
        inner(self, loss, *args, **kwargs)
        for parameter in self.host.get_submodule(part).parameters():
            if since <= self.global_step < until and parameter.grad is not None:
                parameter.grad.view(-1)[0] = value
                break

    monkeypatch.setattr(HostDriver, "manual_backward", backward)


def finite(path):
    content = torch.load(path, weights_only=True)
    states = [s for o in content["optimizer_states"] for s in o["state"].values()]
    tensors = [*content["state_dict"].values(), *(v for s in states for v in s.values())]
    return all(v.isfinite().all() for v in tensors if isinstance(v, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "message", "extra"),
    [
        ("decoder", "in decoder", ["training.gradient_clip_val=1.0"]),
        pytest.param(
            *("loss.discriminator", "discriminator's gradient is not finite in discriminator", []),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("loss.lgvq", "in heads", [*LGVQ, "training.accumulate_grad_batches=2"]),
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("-inf"), marks=EXTENDED)])
def test_a_gradient_that_is_not_finite_reaches_no_weight(
    config, tmp_path, monkeypatch, part, message, extra, value
):
    poison(monkeypatch, part, value, since=3)
    with pytest.raises(FloatingPointError, match=rf"step [23]: .*{message} .*last\.ckpt"):
        train(config(*EVERY, *extra), name="a", logdir=tmp_path, progress=False)
    files = sorted((tmp_path / "a/checkpoints").iterdir())
    assert [file.name for file in files][:2] == ["last.ckpt", "step=00000001.ckpt"]
    assert all(finite(file) for file in files)


@pytest.mark.slow
def test_skipping_leaves_an_update_out_but_not_for_ever(config, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        poison(patch, "encoder", float("nan"), since=1, until=2)
        run = train(config(*EVERY, *SKIP), name="a", logdir=tmp_path, progress=False)
    assert run.steps == 4
    assert "step 1: the generator's gradient is not finite in encoder" in caplog.text
    before, after = (
        torch.load(run.folder / f"checkpoints/step=0000000{n}.ckpt", weights_only=True)
        for n in (1, 2)
    )
    key = "decoder.conv_out.weight"
    assert torch.equal(before["state_dict"][key], after["state_dict"][key])
    assert finite(run.checkpoint)
    monkeypatch.setattr("lgvq_plugin.training.driver.MAX_SKIPPED", 3)
    poison(monkeypatch, "encoder", float("nan"), since=1)
    with pytest.raises(FloatingPointError, match=r"step 3: .*3th skipped update in a row"):
        train(config(*SKIP, "training.max_steps=9"), name="b", logdir=tmp_path, progress=False)


@pytest.mark.slow
def test_a_head_that_is_nan_ends_the_run_also_when_terms_are_skipped(config, tmp_path):
    def break_head(host):
        with torch.no_grad():
            next(host.loss.alignment.code_vit.parameters()).fill_(torch.nan)

    with pytest.raises(FloatingPointError, match=r"the heads' own weights are not finite \(code_v"):
        train(config(*SKIP), name="a", logdir=tmp_path, progress=False, prepare=break_head)
    assert not (tmp_path / "a/checkpoints").exists()


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(config, tmp_path, monkeypatch):
    from lgvq_plugin.training.driver import HostDriver

    inner = HostDriver._schedule

    def schedule(self):
        inner(self)
        if self.global_step == 3:
            self.host.decoder.conv_out.weight.data[0] = torch.inf

    monkeypatch.setattr(HostDriver, "_schedule", schedule)
    with pytest.raises(FloatingPointError, match=r"step 3: weights .* decoder \(decoder\.conv_out"):
        train(config(*EVERY), name="a", logdir=tmp_path, progress=False)
    assert torch.load(tmp_path / "a/checkpoints/last.ckpt")["global_step"] == 2


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of two steps of a tiny host that saved both."""
    from small_runs import CONFIG, SMALL_HOST

    given = OmegaConf.merge(CONFIG, OmegaConf.from_dotlist([*EVERY, "training.max_steps=2"]))
    given.model = SMALL_HOST
    folder = tmp_path_factory.mktemp("good")
    train(given, name="a", logdir=folder, progress=False)
    return folder / "a"


ODD = [None, "text", [1], {"a": 1}, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "state_dict",
        "loops.fit_loop",
        "optimizer_states.0.state.0.exp_avg",
        "lgvq_training",
        "global_step",
        *(
            pytest.param(place, marks=EXTENDED)
            for place in (
                "callbacks",
                "loops",
                "loops.fit_loop.epoch_loop~batch_progress",
                "lr_schedulers",
                "optimizer_states",
                "optimizer_states.0",
                "optimizer_states.0.param_groups",
                "optimizer_states.0.param_groups.0.betas",
                "lgvq_training.generators",
                "pytorch-lightning_version",
            )
        ),
    ],
)
def test_a_tampered_checkpoint_is_refused_in_one_line(good, tmp_path, place):
    *way, last = [int(k) if k.isdigit() else k.replace("~", ".") for k in place.split(".")]
    for value in ODD:
        if (place, value) == ("callbacks", {"a": 1}):
            continue  # Lightning ignores callbacks that it does not know
        content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
        node = content
        for key in way:
            node = node[key]
        node[last] = value
        refuse(good, content, tmp_path, "")


def refuse(good, content, tmp_path, reason):
    """Resume from `content`, and expect one line that names the file and the reason."""
    path = tmp_path / "bad.ckpt"
    torch.save(content, path)
    given = OmegaConf.load(good / "configs/merged.yaml")
    given.training.max_steps = 4
    with pytest.raises(ConfigError, match=rf"bad\.ckpt'.*{reason}") as caught:
        train(given, name="b", logdir=tmp_path, resume=path, progress=False)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(good, tmp_path, caplog):
    run = shutil.copytree(good, tmp_path / "a")
    for name in ("last.ckpt", "step=00000002.ckpt"):
        path = run / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:5000])
    given = OmegaConf.load(run / "configs/merged.yaml")
    caplog.set_level(logging.WARNING)
    again = train(given, name="a", logdir=tmp_path, resume="auto", progress=False)
    assert again.steps == 2
    assert re.search(r"last\.ckpt' cannot be read", caplog.text)
    assert re.search(r"resuming from the one before it: .*step=00000001\.ckpt", caplog.text)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match="no older checkpoint"):
        train(given, name="a", logdir=tmp_path, resume="auto", progress=False)


def test_a_foreign_lightning_checkpoint_leads_to_retrofit(config, good, tmp_path):
    content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
    del content["lgvq_training"]
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match=r"another trainer's.*lgvq retrofit .*--ckpt .*foreign"):
        train(config(), name="b", logdir=tmp_path, resume=tmp_path / "foreign.ckpt", progress=False)


def test_what_a_kill_left_is_removed_on_resume(good, tmp_path):
    run = shutil.copytree(good, tmp_path / "a")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [
        run / f"checkpoints/step=00000003.ckpt.{dead.pid}.part",
        run / f"a.csv.{os.getpid()}.part",
    ]
    for path in left:
        path.write_bytes(b"half")
    alive = run / "results.json.1.part"  # process 1 is always there
    alive.write_bytes(b"")
    with (run / "metrics.csv").open("a") as file:
        file.write("1")  # half a row
    given = OmegaConf.load(run / "configs/merged.yaml")
    given.training.max_steps = 3
    assert train(given, name="a", logdir=tmp_path, resume="auto", progress=False).steps == 3
    assert list(run.rglob("*.part")) == [alive]
    rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2", "3"]


@pytest.mark.slow
def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(good, tmp_path, capsys):
    run = shutil.copytree(good, tmp_path / "a")
    size = (run / "checkpoints/last.ckpt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = ["train", "-b", str(run / "configs/merged.yaml"), "--name", "a", "--logdir"]
    argv += [str(tmp_path), "--resume", "auto", "--no-progress", "training.max_steps=3"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        assert cli.main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert re.search(r"cannot write '.*step=00000003\.ckpt': .*last checkpoint is .*last", message)
    assert "Traceback" not in message
    assert not [*run.rglob("*.part")]
    assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == 2
    assert cli.main(argv) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_dropped_still_stops_the_run(config, tmp_path):
    class Drops:
        def __del__(self):  # Python prints what is raised in here, and goes on
            os.kill(os.getpid(), signal.SIGINT)

    def prepare(host):
        Drops()

    given = config("training.max_steps=50")
    with pytest.raises(Interrupted, match="stopped"):
        train(given, name="a", logdir=tmp_path, progress=False, prepare=prepare)


@pytest.mark.slow
def test_the_bar_shows_the_losses_between_two_rows(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "BAR_SECONDS", 0.0)
    train(config("training.log_every=1000", "training.max_steps=3"), name="a", logdir=tmp_path)
    shown = set(re.findall(r"aeloss=([\d.]+)", capsys.readouterr().err))
    assert len(shown) == 3  # one a step; metrics.csv has a row of the first and the last alone


def _group(content):
    return content["optimizer_states"][0]["param_groups"][0]


def _moments(content):
    return content["optimizer_states"][0]["state"][0]


def _without_counts(content):
    """Return the first optimizer's state, as versions before 0.2 saved it."""
    del content["lgvq_training"]["moments"]
    return content["optimizer_states"][0]


def _weights(content, change):
    key = "quant_conv.weight"
    content["state_dict"][key] = change(content["state_dict"][key])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda c: _group(c).update(lr=-1.0), "Invalid learning rate"),
        (lambda c: _group(c).update(lr=float("nan")), "Invalid learning rate"),
        (lambda c: _group(c).update(betas=(2.0, 2.0)), "Invalid beta"),
        (lambda c: _group(c).pop("lr"), "lr is missing"),
        (lambda c: _group(c).pop("params"), "params is missing"),
        (lambda c: _moments(c).pop("step"), r"state\[0\] has no step"),
        (lambda c: _moments(c).pop("exp_avg"), r"state\[0\] has no exp_avg"),
        (lambda c: _moments(c)["exp_avg"].fill_(torch.nan), r"state\[0\] does not fit"),
        (lambda c: _moments(c)["exp_avg_sq"].fill_(-1.0), r"state\[0\] does not fit"),
        (lambda c: _moments(c).update(step=torch.ones(3)), r"state\[0\] does not fit"),
        (lambda c: _moments(c).update(step=torch.ones(1, device="meta")), "does not fit"),
        (lambda c: _moments(c).update(exp_avg=_moments(c)["exp_avg"].to("meta")), "does not fit"),
        (lambda c: c["optimizer_states"][0]["state"].update({0: 0.5}), r"state\[0\] is of type"),
        (lambda c: c["lgvq_training"].update(samples=1.5), r"samples is 1\.5"),
        (lambda c: c["lgvq_training"].update(samples=10**30), r"samples is 10{30}"),
        (lambda c: c["optimizer_states"][0]["state"].pop(3), r"\.state has \d+ entries, expected"),
        (lambda c: c["optimizer_states"][0]["state"].clear(), r"\.state has 0 entries, expected"),
        (lambda c: _without_counts(c)["state"].clear(), r"\.state has 0 entries, expected"),
        (lambda c: c["lgvq_training"].update(generators=[]), "generators has 0 entries"),
        (lambda c: c.update({"pytorch-lightning_version": "0.1"}), r"version is '0\.1'"),
        (lambda c: c.update({"pytorch-lightning_version": "2.0junk!"}), "version is '2.0junk!'"),
        (lambda c: _weights(c, torch.Tensor.int), "quant_conv.weight is of torch.int32"),
        (lambda c: _weights(c, lambda w: w.to(torch.complex64)), "is of torch.complex64"),
        (lambda c: _weights(c, torch.Tensor.to_sparse), "quant_conv.weight is of type"),
        (lambda c: _weights(c, lambda w: w.fill_(torch.inf)), "quant_conv.weight holds NaN or inf"),
    ],
)
def test_a_checkpoint_with_impossible_values_is_refused(good, tmp_path, tamper, reason):
    content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
    tamper(content)
    refuse(good, content, tmp_path, reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tamper",
    [
        lambda c: _weights(c, lambda w: w.fill_(torch.inf)),
        lambda c: _moments(c)["exp_avg"].fill_(torch.nan),
        lambda c: _group(c).update(lr=-1.0),
    ],
)
def test_auto_falls_back_when_the_newest_checkpoint_holds_impossible_values(
    good, tmp_path, caplog, tamper
):
    run = shutil.copytree(good, tmp_path / "a")
    for name in ("last.ckpt", "step=00000002.ckpt"):
        path = run / "checkpoints" / name
        content = torch.load(path, weights_only=True)
        tamper(content)
        path.unlink()
        torch.save(content, path)
    given = OmegaConf.load(run / "configs/merged.yaml")
    again = train(given, name="a", logdir=tmp_path, resume="auto", progress=False)
    assert again.steps == 2
    assert re.search(r"last\.ckpt' cannot be resumed", caplog.text)
    assert re.search(r"resuming from the one before it: .*step=00000001\.ckpt", caplog.text)
    assert finite(again.checkpoint)
