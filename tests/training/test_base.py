"""Configs: what is merged, what is built, and what a user reads when it is wrong."""

import pytest
import torch
from omegaconf import OmegaConf

from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_dataset, build_host
from lgvq_plugin.training.config import Sections, read_config
from lgvq_plugin.training.settings import TrainingConfig


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {max_steps: 1, seed: 2}\nmodel: {target: a}\n")
    (tmp_path / "b.yaml").write_text("training: {max_steps: 3}\n")
    config = read_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["training.val_every=null"])
    assert config == {
        "training": {"max_steps": 3, "seed": 2, "val_every": None},
        "model": {"target": "a"},
    }


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "broken.yaml").write_text("model:\n  a: [1,\ntraining: }\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "brokn.yaml", r"does not exist; did you mean 'broken\.yaml'"),
        (tmp_path / "broken.yaml", r"broken\.yaml:3: broken YAML"),
        (tmp_path / "list.yaml", "expected a mapping"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_config([path])
    with pytest.raises(ConfigError, match="'max_steps': expected key=value"):
        read_config([], ["max_steps"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainig.max_steps=1", "no section 'trainig' in a config; did you mean 'training'"),
        ("training.val_evry=1", "training: no key 'val_evry'; did you mean 'val_every'"),
        ("training.max_steps=null", "training.max_steps is missing"),
        ("training.max_steps=0", "max_steps must be a whole number > 0, got 0"),
        ("training.ema_decay=1.5", r"ema_decay must be in \(0, 1\), or null, got 1.5"),
        ("training.seed=a", "training.seed must be"),
        ("training.two_forward=maybe", "two_forward must be true or false"),
        ("data.batch_size=0", "data.batch_size must be a whole number >= 1"),
        ("data.bach_size=1", "data: no key 'bach_size'; did you mean 'batch_size'"),
        ("data.train=null", "data.train is missing"),
        ("data.train.params.root=???", r"data.train.params.root is \?\?\? in the config"),
        ("model.base_learning_rate=null", "give base_learning_rate, or learning_rate"),
        ("model.base_learning_rate=fast", "must be a number > 0, got 'fast'"),
        ("model.target=null", "model.target is missing"),
        ("model=null", "has no section `model:`"),
        ("data=null", "has no section `data:`"),
    ],
)
def test_a_wrong_config_says_what_and_where(config, change, message):
    with pytest.raises(ConfigError, match=message):
        Sections.from_config(config(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.target=taming.models.vqgan.VQModle", "did you mean 'VQModel'"),
        ("model.target=no_such_package.Host", "no module named 'no_such_package'"),
        ("model.params.lossconfig.target=taming.x.Y", r"model\.params\.lossconfig\.target: "),
        ("model.params.lossconfig.params.disc_strat=1", "disc_strat"),
        ("model.params.n_codes=1", "n_codes"),
    ],
)
def test_a_host_that_cannot_be_built_is_reported(config, change, message):
    with pytest.raises(ConfigError, match=message):
        build_host(config(change))


def test_hosts_are_built_from_plain_or_omegaconf(config):
    torch.manual_seed(0)
    first = build_host(config()).state_dict()
    torch.manual_seed(0)
    second = build_host(OmegaConf.to_container(config())).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_datasets_by_short_name_or_path():
    params = {"length": 3, "size": 8}
    for target in ("scenes", "lgvq_plugin.datasets.scenes.Scenes"):
        assert len(build_dataset({"target": target, "params": params})) == 3
    with pytest.raises(ConfigError, match="did you mean 'scenes'"):
        build_dataset({"target": "scene"})
    with pytest.raises(ConfigError, match="lenght"):
        build_dataset({"target": "scenes", "params": {"lenght": 3}})


def test_the_keys_of_data_may_stand_where_taming_has_them(config):
    direct = config()
    nested = config()
    nested.data = {"target": "main.DataModuleFromConfig", "params": direct.data}
    assert Sections.from_config(nested).data == Sections.from_config(direct).data


def test_tamings_learning_rate_rule(config):
    given = [
        "model.base_learning_rate=4.5e-6",
        "training.scale_lr=true",
        "data.batch_size=8",
        "training.accumulate_grad_batches=2",
    ]
    assert Sections.from_config(config(*given)).learning_rate(4) == pytest.approx(
        4.5e-6 * 8 * 2 * 4
    )
    given[1] = "training.scale_lr=false"
    assert Sections.from_config(config(*given)).learning_rate(4) == 4.5e-6
    given[1] = "model.learning_rate=1e-4"
    assert Sections.from_config(config(*given)).learning_rate(4) == 1e-4


def test_the_lightning_section_of_old_configs_is_passed_over(config, caplog):
    Sections.from_config(config("lightning.trainer.max_steps=7")).warn()
    assert "`lightning:` section is not read" in caplog.text


def test_training_needs_only_max_steps():
    assert TrainingConfig(max_steps=1) == TrainingConfig.from_dict({"max_steps": 1})
