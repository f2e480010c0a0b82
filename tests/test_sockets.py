"""Names become classes; a name that is none gets one clear message."""

import importlib
import sys

import pytest

from lgvq_plugin.hosts.vqvae import VQVAE
from lgvq_plugin.sockets import ConfigError, import_target, instantiate, resolve, suggest
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.config import model_section


def test_suggest():
    assert suggest("wieght", ["weight", "start"]) == "; did you mean 'weight'? Known: start, weight"
    assert suggest("zzz", ["weight"]) == ". Known: weight"
    assert suggest("zzz", []) == ""
    assert suggest(3, {"30": 1}) == "; did you mean '30'? Known: 30"


@pytest.mark.parametrize(
    "path", ["collections.OrderedDict", "collections:OrderedDict", "lgvq_plugin.types.Codes"]
)
def test_a_path_that_exists(path):
    module, _, name = path.replace(":", ".").rpartition(".")
    assert import_target(path) is getattr(importlib.import_module(module), name)


def test_a_class_in_a_class():
    import unittest.mock

    assert import_target("unittest.mock.MagicMock.mock_add_spec") is (
        unittest.mock.MagicMock.mock_add_spec
    )


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("OrderedDict", "no dotted path; expected 'package.module.Class'"),
        ("", "no dotted path"),
        (".relative", "no dotted path"),
        ("a..b", "no dotted path"),
        ("a b.c", "no dotted path"),
        (None, "no dotted path"),
        (3, "no dotted path"),
        ("nowhere_at_all.Thing", "no module named 'nowhere_at_all'"),
        ("collections.nowhere.Thing", "no module named 'collections.nowhere'"),
        ("collections.OrderedDic", "did you mean 'OrderedDict'"),
        ("lgvq_plugin.hosts.vqvae.VQVEA", "did you mean 'VQVAE'"),
    ],
)
def test_a_path_that_does_not(path, told):
    with pytest.raises(ConfigError) as raised:
        import_target(path)
    assert repr(path) in str(raised.value)
    assert told in str(raised.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that a test may import."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_a_library_that_is_missing_inside(module):
    module("needs_more", "import a_library_nobody_has\nclass Thing: pass\n")
    with pytest.raises(ConfigError, match="needs 'a_library_nobody_has', not installed"):
        import_target("needs_more.Thing")


def test_a_broken_module_shows_its_own_error(module):
    module("breaks", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        import_target("breaks.Thing")


@pytest.mark.parametrize("room", ["guides", "objectives", "datasets", "hosts"])
def test_members_are_strings(room):
    members = importlib.import_module(f"lgvq_plugin.{room}").MEMBERS
    assert members
    for path in members.values():
        assert all(part.isidentifier() for part in path.split("."))


def test_resolve():
    assert resolve("objectives", "masked_text").__name__ == "MaskedText"
    assert resolve("objectives", "collections.OrderedDict").__name__ == "OrderedDict"
    assert resolve("objectives", "collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("masked_tex", "unknown member of objectives: 'masked_tex'; did you mean 'masked_text'"),
        ("zzz", "masked_text, relationship, vision_alignment; or give 'pkg.module:Class'"),
        (3, "a member of objectives is named by a string, got 3"),
        (None, "got None"),
        ("nowhere_at_all:Thing", "no module named"),
    ],
)
def test_resolve_refuses(name, told):
    with pytest.raises(ConfigError) as raised:
        resolve("objectives", name)
    assert told in str(raised.value)


def test_instantiate():
    assert instantiate({"target": "fractions.Fraction", "params": {"numerator": 3}}) == 3
    assert instantiate({"target": "fractions.Fraction", "params": None}, numerator=2) == 2


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"params": {}}, "expected a mapping with a `target:`, got keys ['params']"),
        ("fractions.Fraction", "expected a mapping with a `target:`"),
        ({"target": "fractions.Fraction", "params": [1]}, "`params:` must be a mapping, got [1]"),
        ({"target": "fractions.Fraction", "params": {1: 2}}, "`params:` must be a mapping"),
        ({"target": "fractions.Fraction", "params": {"nume": 1}}, "given params: ['nume']"),
    ],
)
def test_instantiate_refuses(config, told):
    with pytest.raises(ConfigError) as raised:
        instantiate(config)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (
            "lgvq_plugin.guides.tokens.Assemble",
            {"AbstractTokenGuide", "assemble", "features_of", "require_length", "with_mean_row"},
        ),
        (
            "lgvq_plugin.arguments.choose",
            {"add_shortcuts", "choose_device", "is_override", "parse_words"},
        ),
    ],
)
def test_known_names_are_those_that_the_module_defines(path, known):
    with pytest.raises(ConfigError, match="Known: ") as raised:
        import_target(path)
    assert set(str(raised.value).partition("Known: ")[2].split(", ")) == known


def test_an_error_inside_the_constructor_stays_itself(module):
    module("inside", "class Thing:\n    def __init__(self): len(1, 2)\n")
    with pytest.raises(TypeError) as raised:
        instantiate({"target": "inside.Thing"})
    assert not isinstance(raised.value, ConfigError)


def test_another_package_adds_a_member_by_an_entry_point(install):
    install("their_package", "[lgvq_plugin.guides]\ntheirs = collections:OrderedDict\n")
    assert resolve("guides", "theirs").__name__ == "OrderedDict"
    with pytest.raises(ConfigError, match="did you mean 'theirs'"):
        resolve("guides", "their")


@pytest.mark.parametrize("target", ["vqvae", "lgvq_plugin.hosts.vqvae.VQVAE"])
def test_a_host_has_a_short_name_too(target):
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    params = {"lossconfig": loss, "channels": 8, "embed_dim": 4, "n_embed": 8}
    model = {"target": target, "params": params, "learning_rate": 1e-3}
    assert type(build_host({"model": model})) is VQVAE
    # A run's config has the path, so that both spellings resume each other.
    assert model_section({"model": model})["target"] == "lgvq_plugin.hosts.vqvae.VQVAE"


def test_an_unknown_host_is_named():
    with pytest.raises(ConfigError, match=r"model.target: .*'vqvea'; did you mean 'vqvae'"):
        build_host({"model": {"target": "vqvea", "learning_rate": 1e-3}})
