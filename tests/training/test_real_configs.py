"""Configs as they are found: other programs' layouts, interpolations, wrong params."""

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_dataset, build_host
from lgvq_plugin.training.config import Sections, lay_over, lgvq_block, read_config, to_plain
from lgvq_plugin.training.run import train

LOSS = "model.params.lossconfig"
OURS = f"{LOSS}.target=lgvq_plugin.LGVQLoss"


@pytest.fixture
def tiny(config):
    return OmegaConf.to_container(config())


@pytest.fixture
def read(tmp_path, tiny):
    """A function of overrides, with a change of the file, that reads the tiny config."""

    def call(*overrides, **roots):
        path = tmp_path / "c.yaml"
        OmegaConf.save(OmegaConf.create({**tiny, **roots}), path)
        return read_config([path], overrides)

    return call


def test_short_forms_reach_the_loss(read):
    config = read(OURS, "lgvq.stop=6", "recipe=paper", "objectives=[masked_text]")
    block = lgvq_block(Sections.from_config(config).plain)
    assert (block["stop"], block["recipe"]) == (6, "paper")
    assert block["objectives"]["relationship"]["weight"] == 0
    assert "masked_text" not in block["objectives"]
    config = read(OURS, "objectives=[masked_text]")  # off by default
    block = lgvq_block(Sections.from_config(config).plain)
    assert block["objectives"]["masked_text"]["weight"] == 0.05
    assert block["objectives"]["global_semantic"]["weight"] == 0
    over = read(OURS, f"{LOSS}.params.lgvq.stop=4")
    assert lgvq_block(over)["stop"] == 4


def test_a_short_form_over_a_loss_that_takes_none_is_refused(read):
    with pytest.raises(ConfigError, match=r"target to lgvq_plugin\.LGVQLoss"):
        Sections.from_config(read("lgvq.stop=6"))


def test_another_guide_loses_the_options_of_the_first(read):
    config = read(OURS, f"{LOSS}.params.lgvq.guide={{use: open_clip, model: ViT-B-32}}")
    block = lgvq_block(lay_over(config, {"lgvq": {"guide": {"use": "micro_clip"}}}))
    assert block["guide"] == {"use": "micro_clip"}


def test_interpolations_lead_across_sections_and_to_helpers(read):
    config = read(
        "model.params.ddconfig.resolution=${data.train.params.size}",
        "data.train.params.size=${sizes.image}",
        sizes={"image": 16},
    )
    sections = Sections.from_config(config)
    assert sections.model["params"]["ddconfig"]["resolution"] == 16
    assert "sizes" not in sections.plain
    build_host(config)
    assert to_plain(config, "model")["model"]["params"]["ddconfig"]["resolution"] == 16


@pytest.mark.parametrize("word", ["sizs.image=8", "trainig.max_steps=1", "run/step=3.ckpt"])
def test_an_override_of_nothing_is_refused(read, word):
    with pytest.raises(ConfigError, match=r"no section|is not a key"):
        read(word, sizes={"image": 16})


def test_lightning_cli_configs_are_mapped(read, tiny, caplog):
    data = {"class_path": "main.DataModuleFromConfig", "init_args": tiny["data"]}
    model = {
        "class_path": "toy.RatedHost",
        "init_args": {"lossconfig": {"target": "torch.nn.MSELoss"}, "learning_rate": 3e-4},
    }
    trainer = {"max_steps": 5, "devices": 8, "precision": "bf16-mixed"}
    config = read(model=model, data=data, trainer=trainer, training={}, seed_everything=42)
    sections = Sections.from_config(config)
    sections.warn()
    assert sections.data.batch_size == 2
    assert (sections.training.seed, sections.training.max_steps) == (42, 5)
    assert sections.learning_rate(8) == 3e-4
    assert isinstance(build_host(sections.plain), nn.Module)
    assert "trainer.devices: not read" in caplog.text


def test_vit_vqgan_configs_are_mapped(tmp_path, tiny):
    host = {"target": "toy.AttributeHost", "learning_rate": 1e-4}
    params = {
        "encoder": {"dim": "${dataset.params.batch_size}"},
        "loss": {"target": "torch.nn.MSELoss"},
    }
    data = {"target": "enhancing.D", "params": tiny["data"]}
    whole = {"model": {**host, "params": params}, "dataset": data, "training": {"max_steps": 1}}
    OmegaConf.save(OmegaConf.create(whole), tmp_path / "c.yaml")
    config = read_config([tmp_path / "c.yaml"], ["dataset.params.batch_size=3"])
    built = build_host(config)
    assert built.width == Sections.from_config(config).data.batch_size == 3
    assert isinstance(built.given, DictConfig)


def test_keys_that_taming_ignores_are_warned_of(read, caplog):
    sections = Sections.from_config(
        read("model.name=x", "model.scale_lr=true", "data.shuffle=1", wandb={"a": 1})
    )
    sections.warn()
    assert all(key in caplog.text for key in ("model.name", "data.shuffle", "wandb", "not read"))
    assert "name" not in sections.model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_another_data_set_loses_the_params_of_the_first(read, tiny, nested, flip):
    words = ["data.train.target=folder", "data.train.params.root=/x"]
    data = tiny["data"]
    data = {"target": "main.D", "params": data} if nested else data
    sections = Sections.from_config(read(*words[:: -1 if flip else 1], data=data))
    assert sections.data.train == {"target": "folder", "params": {"root": "/x", "size": 16}}
    assert sections.data.validation["target"] == "scenes"


def test_the_known_options_of_a_data_set_are_all_listed():
    params = {"root": "/x", "spilt": "train"}
    with pytest.raises(ConfigError, match=r"did you mean 'split'.*Known: .*crop.*split"):
        build_dataset({"target": "coco", "params": params})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.params=null"], "missing a required argument: 'ddconfig'"),
        (["model.params.ddconfig.ch_mult=null"], "model.params.ddconfig.ch_mult: None"),
        (["model.params.ddconfig.num_res_blocks=null"], "ddconfig.num_res_blocks: None"),
        (["model.params.ckpt_path=/no/such.ckpt"], "model.params.ckpt_path: '/no/such.ckpt'"),
        ([f"{LOSS}.params.disc_start=''"], f"{LOSS}.params.disc_start: expected a finite number"),
        ([f"{LOSS}.params.disc_weight=.inf"], f"{LOSS}.params.disc_weight: expected a finite"),
        ([OURS, f"{LOSS}.params.codebook_weight=1e308"], "codebook_weight: expected a finite"),
        ([OURS, f"{LOSS}.params.kl_weight=1"], "lgvq_plugin.over.<its target>, or params.base"),
        ([OURS, f"{LOSS}.params.base=1"], "base: expected a mapping"),
        ([OURS, "lgvq.objectives.masked_text.weight=1e308"], "masked_text.weight: expected"),
        ([OURS, "lgvq.objectives.global_semantic.temperature=1e30"], "temperature: expected"),
        ([OURS, "lgvq.code_vit.depth=100000"], "depth: expected >= 1 and <= 256"),
        (["training.gradient_clip_val=.inf"], "training.gradient_clip_val must be"),
        (["training.seed=4294967296"], "training.seed must be"),
        (["model.base_learning_rate=.inf"], "model.base_learning_rate"),
    ],
)
def test_one_message_names_the_key(read, words, message):
    with pytest.raises(ConfigError) as raised:
        build_host(Sections.from_config(read(*words)).plain)
    assert message in str(raised.value)


def test_params_that_are_no_mapping_are_refused(read, tiny):
    params = {
        **tiny["model"]["params"],
        "lossconfig": {"target": "torch.nn.L1Loss", "params": 1},
    }
    with pytest.raises(ConfigError, match=r"model.params.lossconfig: `params:` must be a mapping"):
        build_host(read(model={**tiny["model"], "params": params}))


def test_a_data_set_that_cannot_be_built_names_the_key():
    with pytest.raises(ConfigError, match=r"data.params.root: '/no/images'"):
        build_dataset(
            {"target": "torchvision.datasets.ImageFolder", "params": {"root": "/no/images"}}
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=5"], "model: expected a mapping"),
        (["model.params=5"], "model.params: expected a mapping"),
        (["data.params=5"], "data.params: expected a mapping"),
        (["training=5", "seed_everything=3"], "training: expected a mapping, got 5"),
        (["objectives=5"], "objectives: expected some of global_semantic"),
    ],
)
def test_a_section_that_is_no_mapping_is_named(read, words, message):
    with pytest.raises(ConfigError, match=message):
        Sections.from_config(read(*words))


def test_only_what_the_trainer_section_decides_is_reported_as_taken(read, caplog):
    sections = Sections.from_config(read("training.max_steps=2", "trainer.max_steps=1"))
    assert sections.training.max_steps == 2
    sections.warn()
    assert "trainer.max_steps: not read" in caplog.text


def test_an_unknown_guide_is_refused_by_name(read):
    sections = Sections.from_config(read(OURS, "lgvq.guide.use=micro_clop"))
    with pytest.raises(ConfigError, match="did you mean 'micro_clip'"):
        sections.check_names()


@pytest.mark.parametrize("start", [4, 9])
def test_objectives_that_would_start_after_the_last_step_are_refused(read, start):
    config = read(OURS, f"lgvq.start={start}", "training.max_steps=4", "lgvq.stop=10")
    with pytest.raises(ConfigError, match=rf"lgvq\.start: {start} .* training\.max_steps: 4: "):
        Sections.from_config(config).check_names()
    Sections.from_config(read(OURS, "lgvq.start=3", "training.max_steps=4")).check_names()


def test_a_null_block_over_the_loss_s_own_is_refused(read):
    with pytest.raises(ConfigError, match=r"lgvq: expected .* got null.*without LG-VQ"):
        read(OURS, f"{LOSS}.params.lgvq.stop=6", "lgvq=null")
    assert lgvq_block(read(OURS, lgvq=None)) == {}


@pytest.mark.parametrize("word", ["lgvq.rmp=1", "data.train.target=scens", "training.max_stps=1"])
def test_a_config_error_comes_without_warnings_about_other_keys(read, caplog, word, tmp_path):
    config = read(OURS, word, width=1, lightning={"a": 1})
    with pytest.raises(ConfigError):
        train(config, name="a", logdir=tmp_path, progress=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_interpolation_into_a_replaced_data_set_says_what_to_give():
    config = OmegaConf.create({"data": {"validation": {"root": "${data.train.params.root}"}}})
    with pytest.raises(ConfigError, match=r"give it: data\.validation\.root=VALUE"):
        to_plain(config)
