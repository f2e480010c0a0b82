"""The `lgvq:` block: recipes, single keys over them, and one clear message for wrong input."""

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

import lgvq_plugin
from lgvq_plugin.config import RECIPES, GlobalSemanticConfig, LGVQConfig, parse
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host


def blocks(cls=LGVQConfig, path="lgvq"):
    """Yield (path, dataclass) of the block and all blocks in it."""
    yield path, cls
    for key, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from blocks(hint, f"{path}.{key}")


BLOCKS = dict(blocks())


def nested(path, value):
    """Return {"a": {"b": value}} for "lgvq.a.b"."""
    for key in reversed(path.split(".")[1:]):
        value = {key: value}
    return value


def test_nothing_given_is_the_corrected_recipe():
    for given in (None, {}, {"recipe": "corrected"}, {"objectives": None, "code_vit": None}):
        assert parse(given) == LGVQConfig()
    config = parse(None)
    assert config.grid is None
    assert config.guide == {"use": "open_clip"}
    assert config.objectives.masked_text.mask_at == "input"
    assert config.objectives.global_semantic.temperature == 0.03
    assert [own.weight for _, own in config.objectives.items()] == [0.05, 0.0, 0.05, 0.0]
    assert (config.gradient_ratio, config.stop, config.code_vit.min_width) == (1.0, "auto", 128)


def test_the_first_corrected_recipe_keeps_its_defaults():
    config = parse({"recipe": "corrected_v1"})
    weights = [own.weight for _, own in config.objectives.items()]
    assert weights == [1e-3, 1e-2, 1e-4, 0]
    semantic, ras = config.objectives.global_semantic, config.objectives.relationship
    assert (semantic.temperature, semantic.source, ras.between) == (0.07, "cls", "words")
    assert (config.code_vit.min_width, config.code_vit.depth) == (1, 2)
    assert (config.gradient_ratio, config.stop) == (None, None)


def test_the_paper_recipe():
    config = parse({"recipe": "paper"}).objectives
    assert (config.global_semantic.weight, config.masked_text.weight) == (1e-3, 1e-2)
    assert config.relationship.weight == 1e-4
    semantic = config.global_semantic
    assert (semantic.temperature, semantic.learnable_temperature) == (1.0, False)
    assert [semantic.symmetric, semantic.gather, semantic.exclude_same] == [False] * 3
    text = config.masked_text
    assert (text.mask_at, text.ratio, text.label_smoothing) == ("output", (0.1, 0.3), 0.1)
    assert (text.attend_padding, text.attend_cls, text.dropout) == (True, True, 0.1)
    assert (config.relationship.variant, config.relationship.project) == ("paper", True)
    assert (config.relationship.between, config.global_semantic.source) == ("words", "cls")
    whole = parse({"recipe": "paper"})
    assert (whole.gradient_ratio, whole.stop) == (None, None)
    assert (whole.code_vit.min_width, whole.code_vit.depth) == (1, 2)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_names_keys_that_exist(recipe):
    parse({"recipe": recipe, **RECIPES[recipe]})  # an unknown key is an error


def test_the_schedule_takes_steps_and_shares():
    config = parse({"start": "0.1", "ramp": 0.25, "stop": 0.5})
    assert (config.start, config.ramp, config.stop) == (0.1, 0.25, 0.5)
    assert parse({"start": 500, "stop": 0.5}).start == 500
    assert parse({"stop": None}).stop is None


def test_a_codebook_gradient_needs_no_key_for_the_ratio():
    assert parse({"codebook_gradient": True}).gradient_ratio is None
    with pytest.raises(ConfigError, match=r"lgvq\.gradient_ratio: expected null with codebook"):
        parse({"codebook_gradient": True, "gradient_ratio": 2})


def test_single_keys_over_the_paper_recipe():
    given = {"recipe": "paper", "objectives": {"masked_text": {"weight": 0.5, "dropout": 0}}}
    config = parse(given).objectives
    assert (config.masked_text.weight, config.masked_text.dropout) == (0.5, 0.0)
    assert config.masked_text.label_smoothing == 0.1
    assert config.global_semantic == parse({"recipe": "paper"}).objectives.global_semantic
    assert given["objectives"]["masked_text"] == {"weight": 0.5, "dropout": 0}  # untouched


def test_the_guide_keeps_its_keys():
    assert parse({"guide": {"pretrained": None}}).guide == {"use": "open_clip", "pretrained": None}
    assert parse({"guide": {"use": "micro_clip"}}).guide == {"use": "micro_clip"}


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_numbers_as_yaml_reads_them(text):
    given = yaml.safe_load(f"objectives: {{relationship: {{weight: {text}}}}}")
    weight = parse(given).objectives.relationship.weight
    assert isinstance(weight, float)
    assert weight == 0.001


def test_types_are_converted():
    config = parse(
        {
            "start": "1e4",
            "ramp": 10.0,
            "grid": [8, 4],
            "objectives": {"masked_text": {"ratio": ["0.2", 1], "weight": 1}},
        }
    )
    assert (config.start, config.ramp, config.grid) == (10_000, 10, (8, 4))
    assert isinstance(config.start, int)
    assert isinstance(config.ramp, int)
    assert config.objectives.masked_text.ratio == (0.2, 1.0)
    assert isinstance(config.objectives.masked_text.weight, float)


def test_omegaconf_is_read():
    given = OmegaConf.create(
        {
            "grid": [8, 8],
            "guide": {"use": "micro_clip", "x": {"y": [1]}},
            "seed": 3,
            "objectives": {"masked_text": {"ratio": [0.2, 0.4]}},
        }
    )
    config = parse(given)
    assert config.grid == (8, 8)
    assert config.objectives.masked_text.ratio == (0.2, 0.4)
    assert config.guide == {"use": "micro_clip", "x": {"y": [1]}}
    assert type(config.guide["x"]) is dict
    assert type(config.guide["x"]["y"]) is list


@pytest.mark.parametrize("path", sorted(BLOCKS))
def test_an_unknown_key_names_the_nearest(path):
    for field in fields(BLOCKS[path]):
        typo = field.name + "q"
        with pytest.raises(ConfigError) as raised:
            parse(nested(f"{path}.{typo}", 1))
        told = str(raised.value)
        assert told.startswith(f"unknown key {path}.{typo}; did you mean '{field.name}'")


WRONG = [  # path, value, what the message says beside them
    ("lgvq.objectives.masked_text.weight", 1e30, "<= 1e+06"),
    ("lgvq.objectives.global_semantic.words_weight", 1e30, "<= 1e+06"),
    ("lgvq.objectives.global_semantic.temperature", 1e30, "<= 100"),
    ("lgvq.objectives.global_semantic.queue", 10**9, "<= 1048576"),
    ("lgvq.objectives.relationship.temperature", 1e30, "<= 100"),
    ("lgvq.objectives.relationship.temperature", 1e-320, ">= 0.0001"),
    ("lgvq.gradient_ratio", 1e30, "<= 1000"),
    ("lgvq.seed", 2**63, "at most 2.15e+09"),
    ("lgvq.quantizer", [], "a list of different paths"),
    ("lgvq.quantizer", ["a", "a"], "a list of different paths"),
    ("lgvq.layout", "BHWC", "'channels_first' or 'channels_last'"),
    ("lgvq.recipe", "papr", "did you mean 'paper'"),
    ("lgvq.recipe", ["paper"], "corrected, corrected_v1, paper"),
    ("lgvq.objectives", [1], "a mapping"),
    ("lgvq.objectives.masked_text", 0, "a mapping of weight, mask_at"),
    ("lgvq.objectives.masked_text.weight", "abc", "a number"),
    ("lgvq.objectives.masked_text.weight", -1, ">= 0"),
    ("lgvq.objectives.masked_text.weight", True, "a number"),
    ("lgvq.objectives.masked_text.weight", float("nan"), "a number"),
    ("lgvq.objectives.masked_text.weight", None, "a number"),
    ("lgvq.objectives.masked_text.ratio", 0.3, "2 values, each a number, like [0.1, 0.5]"),
    ("lgvq.objectives.masked_text.ratio", [0.5, 0.3], "0 < low <= high <= 1"),
    ("lgvq.objectives.masked_text.ratio", [0.0, 0.3], "0 < low <= high <= 1"),
    ("lgvq.objectives.masked_text.ratio", ["a", 0.3], "a number"),
    ("lgvq.objectives.masked_text.mask_at", "inside", "'input' or 'output'"),
    ("lgvq.objectives.masked_text.label_smoothing", 1, ">= 0 and < 1"),
    ("lgvq.objectives.masked_text.dropout", 1.0, ">= 0 and < 1"),
    ("lgvq.objectives.masked_text.depth", 0, ">= 1"),
    ("lgvq.objectives.masked_text.heads", 0, ">= 1"),
    ("lgvq.objectives.masked_text.attend_padding", "no", "true or false"),
    ("lgvq.objectives.global_semantic.temperature", 0, "> 0"),
    ("lgvq.objectives.global_semantic.temperature", 0.001, ">= 0.01 if learnable"),
    ("lgvq.objectives.global_semantic.source", "mean", "'cls' or 'pooled'"),
    ("lgvq.objectives.relationship.variant", "pair", "'paper' or 'pairs'"),
    ("lgvq.objectives.relationship.matching", 1, "'soft' or 'straight_through'"),
    ("lgvq.objectives.relationship.temperature", 0, "> 0"),
    ("lgvq.code_vit.depth", 0, ">= 1"),
    ("lgvq.code_vit.depth", 1.5, "a whole number"),
    ("lgvq.code_vit.width", 0, ">= 1 or null"),
    ("lgvq.code_vit", {"width": 8, "heads": 3}, "a divisor of the width"),
    ("lgvq.guide", "micro_clip", "{use: micro_clip}"),
    ("lgvq.grid", [16], "2 values, each a whole number, like [16, 16]"),
    ("lgvq.grid", 16, "2 values, each a whole number, like [16, 16]"),
    ("lgvq.grid", [16, 0], "two whole numbers >= 1"),
    ("lgvq.grid", [16, 1.5], "a whole number"),
    ("lgvq.grid", "16", "2 values"),
    ("lgvq.quantizer", 3, "a string"),
    ("lgvq.code_dim", -1, ">= 1 or null"),
    ("lgvq.caption_key", ["text"], "a string"),
    ("lgvq.codebook_gradient", 1, "true or false"),
    ("lgvq.start", -1, "a number of steps, like 500, or a share"),
    ("lgvq.start", 1.5, "a number of steps, like 500, or a share"),
    ("lgvq.ramp", -1, "a number of steps, like 500, or a share"),
    ("lgvq.stop", 0, "> start (0), or null"),
    ("lgvq.stop", -0.5, "a number of steps, like 500, or a share"),
    ("lgvq.seed", 0.5, "a whole number"),
    ("lgvq.on_nonfinite", "ignore", "'raise' or 'skip'"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG)
def test_a_wrong_value_is_told(path, value, expected):
    with pytest.raises(ConfigError) as raised:
        parse(nested(path, value))
    told = str(raised.value)
    assert path in told
    assert expected in told
    value = tuple(value) if path == "lgvq.quantizer" and isinstance(value, list) else value
    assert repr(value["heads"] if isinstance(value, dict) else value) in told
    assert len(told.splitlines()) == 1


def test_a_list_of_quantizers_names_the_entry_that_is_wrong():
    assert parse({"quantizer": "a"}).quantizer == "a"
    assert parse({"quantizer": ["a", "b.c"]}).quantizer == ("a", "b.c")
    with pytest.raises(ConfigError, match=r"lgvq\.quantizer\[1\]: expected a string, got 3"):
        parse({"quantizer": ["a", 3]})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e308])
def test_weights_of_the_base_loss_are_finite(value):
    base = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss", "params": {"disc_weight": value}}
    with pytest.raises(ConfigError, match=r"VQVAELoss\.disc_weight: expected a number of at most"):
        lgvq_plugin.LGVQLoss(base=base)
    model = {"target": "torch.nn.Linear", "learning_rate": 1, "params": {"lossconfig": base}}
    with pytest.raises(ConfigError, match=r"model\.params\.lossconfig\.params\.disc_weight"):
        build_host({"model": model})


@pytest.mark.parametrize("given", ["paper", [1], 3])
def test_a_block_that_is_no_mapping(given):
    with pytest.raises(ConfigError, match="lgvq: expected a mapping"):
        parse(given)


def test_a_block_built_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match=r"weight: expected >= 0 and <= 1e\+06, got -1"):
        GlobalSemanticConfig(weight=-1)


@pytest.mark.parametrize("path", sorted(BLOCKS))
def test_every_key_is_told(path):
    source = inspect.getsource(BLOCKS[path])
    for field in fields(BLOCKS[path]):
        assert re.search(rf'\n    {field.name}: [^\n]*\n    """', source), field.name


@pytest.mark.parametrize("path", sorted(BLOCKS))
def test_every_key_is_read(path):
    package = Path(lgvq_plugin.__path__[0])
    code = "\n".join(f.read_text() for f in package.rglob("*.py") if f.name != "config.py")
    idle = [
        field.name
        for field in fields(BLOCKS[path])
        if not is_dataclass(get_type_hints(BLOCKS[path])[field.name])
        and not re.search(
            rf"(config|parse\(.*\)|\bsettings|code_vit|objectives)\.{field.name}\b", code
        )
        and not (field.name == "weight" and re.search(r"\)\.weight\b", code))
    ]
    assert not idle
