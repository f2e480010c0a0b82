import csv

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import SMALL_HOST

from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host, with_shortcuts
from lgvq_plugin.training.rng import seed_all
from lgvq_plugin.training.run import main, train

VQVAE = {
    "model": {
        **SMALL_HOST,
        "learning_rate": 1e-2,
        "params": {
            **SMALL_HOST["params"],
            "lossconfig": {
                "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
                "params": {"lgvq": {"guide": {"use": "micro_clip"}}},
            },
        },
    },
    "data": {"batch_size": 4, "train": {"target": "scenes", "params": {"size": 16, "length": 12}}},
}


def run(tmp_path, **training):
    """Train; return tensors before the first step and after the last."""
    before = {}
    config = {
        **VQVAE,
        "training": {"accelerator": "cpu", "val_every": None, "images_every": None, **training},
    }

    def keep(host):
        before.update({key: value.clone() for key, value in host.state_dict().items()})

    host = train(config, name="run", logdir=tmp_path, progress=False, prepare=keep).host
    return before, host.state_dict()


def moved(before, after, prefixes):
    keys = [key for key in before if key.startswith(prefixes)]
    assert keys
    return [key for key in keys if not torch.equal(before[key], after[key])]


@pytest.mark.slow
def test_prepare_sees_the_host_before_the_first_step(tmp_path):
    before, after = run(tmp_path, max_steps=1)
    assert moved(before, after, ("encoder.",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "still", "moves"),
    [
        ("encoder", ("encoder.", "quant_conv."), ("decoder.", "quantize.", "loss.lgvq.")),
        ("decoder", ("decoder.", "post_quant_conv."), ("encoder.", "quantize.")),
        ("codebook", ("quantize.",), ("encoder.", "decoder.")),
    ],
)
def test_a_frozen_part_keeps_its_weights_and_buffers(tmp_path, part, still, moves):
    before, after = run(tmp_path, max_steps=3, freeze=[part])
    assert moved(before, after, still) == []
    for prefix in moves:
        assert moved(before, after, (prefix,)), prefix


@pytest.mark.slow
def test_at_first_only_the_heads_learn(tmp_path):
    before, after = run(tmp_path / "first", max_steps=3, heads_first=3)
    host = tuple(key for key in before if not key.startswith("loss.lgvq."))
    assert moved(before, after, host) == []
    assert moved(before, after, ("loss.lgvq.code_vit.",))
    before, after = run(tmp_path / "then", max_steps=4, heads_first=3)
    for prefix in ("encoder.", "decoder.", "quantize."):
        assert moved(before, after, (prefix,)), prefix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "aligned"),
    [
        ({"freeze": ["host"]}, [1, 2, 3, 4, 5, 6, 7]),
        ({"freeze": ["encoder", "codebook"]}, [1, 2, 3, 4, 5]),  # `stop: auto`
        ({"heads_first": 3}, [1, 2, 3, 5]),
        ({}, [1, 5]),
    ],
    ids=["heads", "decoder", "heads first", "all"],
)
def test_every_batch_is_aligned_where_no_code_learns(tmp_path, training, aligned):
    run(tmp_path, max_steps=7, log_every=1, **training)
    lines = csv.DictReader((tmp_path / "run/metrics.csv").open())
    assert [int(x["step"]) for x in lines if x.get("train/lgvq/global_semantic")] == aligned


@pytest.mark.slow
def test_at_first_the_discriminator_rests_too(config, tmp_path):
    before = {}
    section = config("training.max_steps=3", "training.heads_first=2")
    section.model.params.lossconfig.target = "lgvq_plugin.LGVQLoss"
    section.model.params.lossconfig.params.lgvq = {"guide": {"use": "micro_clip"}}
    section.model.params.lossconfig.params.disc_start = 0

    def keep(host):
        before.update({key: value.clone() for key, value in host.state_dict().items()})

    section.training.max_steps = 2
    after = train(section, name="a", logdir=tmp_path, progress=False, prepare=keep).host
    parts = ("loss.discriminator.", "encoder.", "decoder.", "quantize.")
    assert moved(before, after.state_dict(), parts) == []
    section.training.max_steps = 3
    after = train(section, name="b", logdir=tmp_path, progress=False, prepare=keep).host
    for prefix in parts:
        assert moved(before, after.state_dict(), (prefix,)), prefix


@pytest.mark.slow
def test_with_a_frozen_decoder_the_adaptive_weight_is_still_there(config, tmp_path):
    section = config("training.max_steps=3", "training.freeze=[decoder]")
    section.model.params.lossconfig.params.disc_start = 0
    result = train(section, name="a", logdir=tmp_path, progress=False)
    assert result.metrics["train/d_weight"] > 0


def test_heads_first_asks_for_heads(config, tmp_path):
    with pytest.raises(ConfigError, match="has no heads of LG-VQ"):
        train(config("training.heads_first=1"), name="a", logdir=tmp_path, progress=False)


@pytest.mark.parametrize("wrong", ["training.freeze=[encodr]", "training.heads_first=-1"])
def test_wrong_values_are_refused(config, tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"training\.(freeze|heads_first) must be"):
        train(config(wrong), name="a", logdir=tmp_path, progress=False)


def command(tmp_path, section, *words):
    """Run `lgvq train --train ...` in a folder, from a config file."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "c.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(section)))
    main(["-b", str(path), "--logdir", str(tmp_path), "--name", "run", "--no-progress", *words])


TINY = {**VQVAE, "training": {"accelerator": "cpu", "val_every": None, "images_every": None}}


EXTENDED = (pytest.mark.slow, pytest.mark.extended)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["vqvae", pytest.param("taming", marks=EXTENDED)])
def test_training_the_heads_alone_leaves_every_tensor_of_the_host(config, tmp_path, host):
    section = TINY
    if host == "taming":  # with a discriminator, whose BatchNorm keeps statistics
        section = OmegaConf.to_container(config())
        loss = section["model"]["params"]["lossconfig"]
        loss["target"], loss["params"]["disc_start"] = "lgvq_plugin.LGVQLoss", 0
        loss["params"]["lgvq"] = {"guide": {"use": "micro_clip"}}
    command(tmp_path / "a", section, "--train", "heads", "--max-steps", "1")
    command(tmp_path / "b", section, "--train", "heads", "--max-steps", "4")
    files = [tmp_path / name / "run/checkpoints/last.ckpt" for name in "ab"]
    one, four = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    seed_all(0)
    start = build_host(section).state_dict()
    for after in (one, four):
        hosts = [key for key in start if not key.startswith("loss.lgvq.")]
        assert len(hosts) > 10
        assert [key for key in hosts if not torch.equal(start[key], after[key])] == []
    for before, after in ((start, one), (one, four)):  # they learn to the end
        assert moved(before, after, ("loss.lgvq.code_vit.",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "still", "moves"),
    [
        ("decoder", ("encoder.", "quant_conv.", "quantize."), ("decoder.", "loss.lgvq.")),
        pytest.param(
            *("encoder", ("decoder.", "quantize."), ("encoder.", "loss.lgvq.")), marks=EXTENDED
        ),
        pytest.param("all", (), ("encoder.", "decoder.", "quantize."), marks=EXTENDED),
    ],
)
def test_a_part_alone_learns_beside_the_heads(tmp_path, part, still, moves):
    command(tmp_path, TINY, "--train", part, "--max-steps", "3")
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    seed_all(0)
    before = build_host(TINY).state_dict()
    for prefix in still:
        assert moved(before, after, (prefix,)) == []
    for prefix in moves:
        assert moved(before, after, (prefix,)), prefix


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--train", "decoder", "training.freeze=[codebook]"],
            r"freezes \['encoder', 'codebook'\]",
        ),
        (["--train", "all", "training.freeze=[codebook]"], "give only one of them"),
        (["--train", "heads", "training.heads_first=2"], "heads_first .* is 2, after which"),
    ],
)
def test_contradictions_are_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        command(tmp_path, TINY, "--max-steps", "3", *words)


def test_the_same_said_twice_is_none(tmp_path):
    config = OmegaConf.create({"training": {"freeze": ["codebook", "encoder"]}})
    freeze = with_shortcuts(config, trained="decoder").training.freeze
    assert sorted(freeze) == ["codebook", "encoder"]


def test_heads_alone_need_heads(small, tmp_path):
    section = OmegaConf.to_container(small())
    with pytest.raises(ConfigError, match=r"training.freeze: \[host\], but VQVAE has no heads"):
        command(tmp_path, section, "--train", "heads")


@pytest.mark.slow
def test_a_stop_that_ends_the_training_of_the_heads_is_reported(tmp_path, caplog):
    command(tmp_path, TINY, "--train", "heads", "--max-steps", "2", "lgvq.stop=1")
    assert "lgvq.stop: 1 ends that early" in caplog.text


@pytest.mark.slow
def test_heads_alone_train_to_the_end_of_the_run(tmp_path):
    """`stop: auto` would end the only training there is."""
    training = {**TINY["training"], "freeze": ["host"], "checkpoint_every": 8}
    command(tmp_path, {**TINY, "training": training}, "--max-steps", "10")
    before, after = (
        torch.load(tmp_path / "run" / "checkpoints" / name, weights_only=True)["state_dict"]
        for name in ("step=00000008.ckpt", "last.ckpt")
    )
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved
    assert all("lgvq" in key for key in moved)
