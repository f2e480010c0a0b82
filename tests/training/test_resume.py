"""A run that was stopped and resumed is the run that was not, bit for bit."""

import csv
import os
import signal

import numpy as np
import pytest
import torch
from small_runs import SMALL_HOST

from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training import run as training_run
from lgvq_plugin.training.callbacks import TrainingCallback
from lgvq_plugin.training.driver import HostDriver
from lgvq_plugin.training.run import Interrupted, train


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(ours, theirs):
    a, b = (torch.load(run.checkpoint, weights_only=True) for run in (ours, theirs))
    for key in ("state_dict", "optimizer_states", "ema_state_dict", "global_step"):
        assert_same(a.get(key), b.get(key), key)
    for key in ("samples", "generators"):
        assert_same(a["lgvq_training"][key], b["lgvq_training"][key], key)
    files = [(run.folder / "metrics.csv").read_text() for run in (ours, theirs)]
    assert files[0] == files[1]


def in_two_halves(config, extra, folder):
    """Train for 4 steps, and resume up to 8."""
    options = {"name": "half", "logdir": folder, "progress": False}
    train(config(*extra, "training.max_steps=4"), **options)
    return train(config(*extra, "training.max_steps=8"), resume="auto", **options)


LGVQ = [
    "model.params.lossconfig.target=lgvq_plugin.LGVQLoss",
    "model.params.lossconfig.params.lgvq.guide.use=micro_clip",
    "model.params.lossconfig.params.lgvq.stop=null",  # a share would change with max_steps
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lgvq", "workers"),
    [
        pytest.param([], 0, marks=pytest.mark.extended),
        pytest.param(LGVQ, 0, marks=pytest.mark.extended),
        (LGVQ, 2),
    ],
)
def test_half_and_half_is_the_whole(config, tmp_path, workers, lgvq):
    # 11 samples, batches of 2: an epoch ends in the middle of the second half.
    extra = [
        *lgvq,
        "training.ema_decay=0.9",
        "training.val_every=2",
        "training.images_every=4",
        f"data.num_workers={workers}",
    ]
    whole = train(
        config(*extra, "training.max_steps=8", "data.num_workers=0"),
        name="whole",
        logdir=tmp_path,
        progress=False,
    )
    resumed = in_two_halves(config, extra, tmp_path)
    assert resumed.steps == 8
    assert_same_run(resumed, whole)


@pytest.mark.slow
def test_accumulation_and_clipping_resume_too(small, tmp_path):
    extra = ["training.accumulate_grad_batches=3", "training.gradient_clip_val=0.5"]
    whole = train(
        small(*extra, "training.max_steps=4"), name="whole", logdir=tmp_path, progress=False
    )
    half = small(*extra, "training.max_steps=2")
    train(half, name="half", logdir=tmp_path, progress=False)
    resumed = train(
        small(*extra, "training.max_steps=4"),
        name="half",
        logdir=tmp_path,
        resume=tmp_path / "half",
        progress=False,
    )
    assert_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "expected"), [(1, [1, 3, 6]), (2, [3, 6])])
def test_a_run_resumed_between_aligned_batches_is_the_whole(
    config, tmp_path, accumulated, expected
):
    extra = [*LGVQ, "model.params.lossconfig.params.lgvq.every=3"]
    extra.append(f"training.accumulate_grad_batches={accumulated}")
    whole = train(
        config(*extra, "training.max_steps=8"), name="whole", logdir=tmp_path, progress=False
    )
    resumed = in_two_halves(config, extra, tmp_path)
    assert_same_run(resumed, whole)
    lines = list(csv.DictReader((tmp_path / "whole/metrics.csv").open()))
    aligned = [int(x["step"]) for x in lines if x.get("train/lgvq/global_semantic")]
    assert aligned == expected


@pytest.mark.slow
@pytest.mark.parametrize(  # place: while the loader is set up, and in the run
    ("number", "place"),
    [
        (signal.SIGTERM, 4),
        (signal.SIGINT, 0),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 4, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_saved_and_resumed(small, tmp_path, monkeypatch, number, place):
    import toy

    monkeypatch.setattr(toy.Killer, "sent", False)
    before = signal.getsignal(number)
    whole = train(small("training.max_steps=6"), name="whole", logdir=tmp_path, progress=False)
    killed = small("training.max_steps=6")
    at = int(np.random.default_rng([0, 0]).permutation(11)[place])
    params = {"size": 16, "length": 11, "at": at, "number": int(number)}
    killed.data.train = {"target": "toy.Killer", "params": params}
    with pytest.raises(Interrupted, match=r"stopped at step \d.*--name killed --resume auto"):
        train(killed, name="killed", logdir=tmp_path, progress=False)
    assert signal.getsignal(number) == before
    assert torch.load(tmp_path / "killed/checkpoints/last.ckpt")["global_step"] < 6
    resumed = train(killed, name="killed", logdir=tmp_path, resume="auto", progress=False)
    assert_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_signal_at_a_step_with_validation_and_images_loses_neither(
    small, tmp_path, monkeypatch, when
):
    """The images are drawn before the run stops; the validation follows when it resumes."""
    due = ["training.max_steps=6", "training.val_every=2", "training.images_every=2"]
    whole = train(small(*due), name="whole", logdir=tmp_path, progress=False)
    owner = HostDriver if when == "during" else TrainingCallback
    name = "evaluate" if when == "during" else "_draw"
    original, calls = getattr(owner, name), []

    def with_signal(self, *given):
        trainer = self.trainer if when == "during" else given[0]
        if trainer.global_step == 4 and not calls:
            calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, *given)

    monkeypatch.setattr(owner, name, with_signal)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        train(small(*due), name="killed", logdir=tmp_path, progress=False)
    resumed = train(small(*due), name="killed", logdir=tmp_path, resume="auto", progress=False)
    assert_same_run(resumed, whole)
    of_both = [
        {path.name: path.read_bytes() for path in (run.folder / "images").iterdir()}
        for run in (resumed, whole)
    ]
    assert "val_00000004.png" in of_both[1]
    assert of_both[0] == of_both[1]


@pytest.mark.slow
def test_rows_after_the_checkpoint_are_written_again(small, tmp_path):
    first = train(small(), name="a", logdir=tmp_path, progress=False)
    with (first.folder / "metrics.csv").open("a") as file:
        file.write("5,1,2,3\n6,1,2,3\n")  # steps of a run that died without a checkpoint
    train(small("training.max_steps=6"), name="a", logdir=tmp_path, resume="auto", progress=False)
    with (first.folder / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_auto_starts_a_new_run_where_there_is_none(small, tmp_path):
    result = train(
        small("training.max_steps=1"), name="a", logdir=tmp_path, resume="auto", progress=False
    )
    assert result.steps == 1


@pytest.mark.slow
def test_a_finished_run_stays_unchanged(small, tmp_path):
    first = train(small(), name="a", logdir=tmp_path, progress=False)
    again = train(small(), name="a", logdir=tmp_path, resume="auto", progress=False)
    assert again.steps == 4
    assert_same(first.host.state_dict(), again.host.state_dict())


@pytest.mark.parametrize("rank", ["LOCAL_RANK", "NODE_RANK", "GROUP_RANK"])
def test_all_processes_of_a_run_get_the_first_one_s_name(monkeypatch, rank):
    monkeypatch.delenv("LGVQ_RUN_NAME", raising=False)
    assert training_run._new_name("tiny").endswith("_tiny")
    monkeypatch.setenv(rank, "1")
    with pytest.raises(ConfigError, match="give --name"):
        training_run._new_name("tiny")
    monkeypatch.setenv("LGVQ_RUN_NAME", "first")
    assert training_run._new_name("tiny") == training_run._new_name() == "first"


def test_only_the_newest_checkpoints_stay(small, tmp_path):
    extra = ["training.checkpoint_every=1", "training.keep_checkpoints=2"]
    result = train(small(*extra), name="a", logdir=tmp_path, progress=False)
    files = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert files == ["last.ckpt", "step=00000003.ckpt", "step=00000004.ckpt"]


@pytest.mark.slow
def test_what_cannot_be_resumed_is_reported(config, tmp_path):
    train(config("training.max_steps=1"), name="a", logdir=tmp_path, progress=False)
    other = config("training.max_steps=2")
    other.model.params.n_embed = 32
    for resume, given, message in [
        (tmp_path / "nothing.ckpt", config(), "no such checkpoint"),
        (tmp_path, config(), "no checkpoint in its checkpoints/"),
        ("auto", other, r"another config: model\.params\.n_embed: 16 then, 32 now"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train(given, name="a", logdir=tmp_path, resume=resume, progress=False)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config(), name="a", logdir=tmp_path, progress=False)
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ConfigError, match=r"damaged\.ckpt' cannot be read"):
        train(config(), name="b", logdir=tmp_path, resume=damaged, progress=False)
    weights = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, weights)
    with pytest.raises(ConfigError, match="holds no optimizers"):
        train(config(), name="b", logdir=tmp_path, resume=weights, progress=False)


@pytest.mark.slow
def test_a_run_whose_heads_were_in_one_group_is_resumed(config, tmp_path, monkeypatch):
    """Earlier versions decayed all heads as the host; now some of them go without."""
    whole = config("training.max_steps=2", "training.heads_first=0")
    loss = {"target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss"}
    lgvq = {"guide": {"use": "micro_clip"}, "stop": None, "every": 1}
    whole["model"] = {
        **SMALL_HOST,
        "target": "toy.DecayedVQVAE",
        "params": {
            **SMALL_HOST["params"],
            "lossconfig": {**loss, "params": {"lgvq": lgvq}},
        },
    }
    options = {"name": "run", "logdir": tmp_path, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr("lgvq_plugin.loss.undecayed_parameters", lambda heads: [])
        old = train(whole, **options)
    saved = torch.load(old.checkpoint, weights_only=True)
    (then,) = saved["optimizer_states"]
    assert len(then["param_groups"]) == 2
    whole["training"]["max_steps"] = 4
    new = train(whole, resume="auto", **options)
    after = torch.load(new.checkpoint, weights_only=True)
    (now,) = after["optimizer_states"]
    assert [group["weight_decay"] for group in now["param_groups"]] == [0.5, 0.5, 0.0]
    assert len({group["lr"] for group in now["param_groups"]}) == 1
    assert {int(each["step"]) for each in now["state"].values()} == {4}


@pytest.mark.slow
def test_a_run_of_version_01_goes_on_with_the_defaults_of_its_time(config, tmp_path, caplog):
    caplog.set_level("INFO")
    first = "model.params.lossconfig.params.lgvq.recipe=corrected_v1"
    options = {"logdir": tmp_path, "progress": False}
    whole = train(config(*LGVQ, first, "training.max_steps=4"), name="whole", **options)
    half = train(config(*LGVQ, first, "training.max_steps=2"), name="half", **options)
    saved = torch.load(half.checkpoint, weights_only=True)
    del saved["lgvq_training"]["defaults"]
    del saved["lgvq_training"]["config"]["model"]["params"]["lossconfig"]["params"]["lgvq"][
        "recipe"
    ]
    del saved["state_dict"]["loss.lgvq.first_step"]
    torch.save(saved, half.checkpoint)
    given = config(*LGVQ, "training.max_steps=3")  # as its user wrote it
    train(given, name="half", resume=half.checkpoint, **options)
    given = config(*LGVQ, "training.max_steps=4")
    resumed = train(given, name="half", resume="auto", **options)
    assert "lgvq.recipe is corrected_v1" in caplog.text
    assert_same_run(resumed, whole)
