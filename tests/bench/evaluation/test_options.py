"""Every overlay of configs/eval is taken, and every option is read and source."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lgvq_plugin
from lgvq_plugin.bench import evaluate as options
from lgvq_plugin.bench.evaluate import TRAINED, EvaluationConfig
from lgvq_plugin.sockets import resolve

FILES = sorted((Path(__file__).parents[3] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_overlay_is_taken_whole(path):
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert set(content) == {"evaluation"}
    block = EvaluationConfig.from_dict(content["evaluation"])
    for name in TRAINED:
        assert block.probe(name)[0] is resolve("bench.probes", name)


def test_there_are_overlays():
    assert {path.stem for path in FILES} == {"photos", "scenes"}


def classes():
    found = [EvaluationConfig, options.LPIPSConfig, options.FIDConfig, options.FDConfig]
    found += [resolve("bench.probes", name).Config for name in TRAINED]
    return [*found, resolve("bench.probes", "text_to_image").Config().sampling.__class__]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_option_is_told_and_read(cls):
    bench = Path(lgvq_plugin.__path__[0]) / "bench"
    files = [*bench.glob("probes/*.py"), *bench.glob("eval*.py"), bench / "measures.py"]
    files += [bench / "classification.py"]
    code = "\n".join(path.read_text() for path in files)
    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    for field in fields(cls):
        assert re.search(rf'\n    {field.name}: [^\n]*\n    """', source), field.name
        named = rf"(\.probe\(|(fit_probe|_fitted|_conditional)\(context, ).{field.name}.[,)]"
        read = rf"(config|options|sampling)\.{field.name}\b|{named}"
        assert re.search(read, code), field.name
