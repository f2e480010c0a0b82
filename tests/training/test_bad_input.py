"""`lgvq train` with the LG-VQ line and something wrong: one clear message, exit code 2."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from lgvq_plugin.cli import main

LGVQ = {
    "model": {
        "params": {
            "lossconfig": {
                "target": "lgvq_plugin.LGVQLoss",
                "params": {"lgvq": {"guide": {"use": "micro_clip"}}},
            }
        }
    }
}
BLOCK = "model.params.lossconfig.params.lgvq"


class Captionless:
    """Images without any caption key."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": np.zeros((16, 16, 3), np.float32), "index": index}


@pytest.fixture
def run(config, tmp_path, capsys, monkeypatch):
    """A function of overrides that runs `lgvq train` and returns (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides, **data):
        path = tmp_path / "config.yaml"
        given = OmegaConf.merge(config("training.max_steps=1"), LGVQ)
        given.data.update(data)
        OmegaConf.save(given, path)
        code = main(["train", "-b", str(path), "--name", "a", "--no-progress", *overrides])
        return code, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_nothing_wrong_is_0_and_lightning_is_quiet(run, caplog):
    code, err = run()
    assert code == 0
    said = err + caplog.text
    assert not [word for word in ("GPU", "TPU", "Tip", "Trainer.fit") if word in said]
    assert "global_semantic x 0.05" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.params.lossconfig.target=lgvq_plugin.LGVQLos", "did you mean 'LGVQLoss'"),
        ("training.precision=13-bits", "precision: 13-bits"),
        ("model.params.ddconfig.ch=8", "num_channels (8) must be divisible by num_groups (32)"),
        ("model.params.lossconfig.target=lgvq_plugin.over.nosuch.Loss", "nosuch"),
        (f"{BLOCK}.objectives.masked_text.wieght=1", "did you mean 'weight'"),
        (f"{BLOCK}.recipe=papier", "paper"),
        ("model=3", "model: expected a mapping"),
        (f"{BLOCK}.caption_key=index", "captions must be a list with one entry per image"),
        (f"{BLOCK}.code_dim=5", "lgvq.code_dim: 4"),
        *(
            pytest.param(*row, marks=pytest.mark.extended)
            for row in (
                ("training.accelerator=hpu", "accelerator: hpu"),
                ("model.params.n_embed=-3", "negative dimension -3"),
                (f"{BLOCK}.quantizer=quantise", "did you mean 'quantize'"),
                (f"{BLOCK}.grid=[16]", "grid"),
                (f"{BLOCK}.caption_key=words", "words"),
                (f"{BLOCK}.guide.use=micro_clop", "did you mean 'micro_clip'"),
            )
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(run, override, said):
    code, err = run(override)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("lgvq: error:")]) == 1


def test_a_missing_guide_checkpoint_says_what_does_without(run):
    use = f"{BLOCK}.guide={{use: open_clip, pretrained: /no/such/file.pt}}"
    code, err = run(use)
    assert code == 2
    assert "/no/such/file.pt" in err
    assert "guide: {use: micro_clip}" in err


@pytest.mark.slow
def test_a_batch_with_no_captions_is_reported(run, monkeypatch):
    import lgvq_plugin.datasets.scenes as scenes

    monkeypatch.setattr(scenes, "Captionless", Captionless, raising=False)
    code, err = run(train={"target": "lgvq_plugin.datasets.scenes.Captionless"})
    assert code == 2
    assert "a batch with no captions" in err
    assert "caption_key" in err


@pytest.mark.slow
def test_a_corrupt_image_is_named_and_can_be_skipped(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red square\n")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    data = {"target": "folder", "params": {"root": str(folder), "size": 16}}
    code, err = run("data.batch_size=4", train=data)
    assert code == 2
    assert "2.png" in err
    assert "skip_corrupt: true" in err
    data["params"]["skip_corrupt"] = True
    assert run("data.batch_size=4", train=data)[0] == 0


@pytest.mark.slow
def test_a_start_that_fails_leaves_no_folder(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"no image")
        (folder / f"{i}.txt").write_text("a red square\n")
    data = {"target": "folder", "params": {"root": str(folder), "size": 16}}
    code, err = run(train=data)
    assert code == 2
    assert ".png" in err
    assert not (tmp_path / "logs" / "a").exists()


def test_a_list_over_a_mapping_is_named():
    from lgvq_plugin.sockets import ConfigError
    from lgvq_plugin.training.config import lay_over

    below = OmegaConf.create({"training": {"max_steps": 2}, "data": {"a": [1]}})
    for part, key in (({"training": [1]}, "training"), ({"data": {"a": {"b": 1}}}, r"data\.a")):
        with pytest.raises(ConfigError, match=rf"^{key}: a list and a mapping cannot be merged"):
            lay_over(below, part)
    merged = lay_over(below, {"data": {"a": [2, 3]}, "training": {"max_steps": 5}})
    assert merged == {"training": {"max_steps": 5}, "data": {"a": [2, 3]}}


def test_a_config_that_holds_a_tensor_is_refused_in_one_message():
    import torch

    from lgvq_plugin.sockets import ConfigError
    from lgvq_plugin.training.config import as_omegaconf

    for bad in ({"a": torch.zeros(2)}, {"a": {None: 1}}):
        with pytest.raises(ConfigError, match="the config holds what no config can"):
            as_omegaconf(bad)


def test_more_workers_than_memory_are_refused(run):
    code, error = run("data.num_workers=1000000")
    assert code == 2
    assert "data.num_workers: expected at most" in error
    assert "got 1000000" in error
