"""`lgvq cache -b CONFIG` encodes all captions of a config, and the overlay it writes trains."""

import json

import pytest
import torch
import yaml
from safetensors.numpy import load_file

from lgvq_plugin.cli import main
from lgvq_plugin.config import parse
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.training.config import Sections, lgvq_block, read_config


@pytest.fixture
def config(tmp_path):
    """A function that writes a config for twelve scenes, with an lgvq block, to a file."""

    def write(**lgvq):
        scenes = [{"target": "scenes", "params": {"split": split, "size": 16, "length": 6}}
                  for split in ("train", "validation")]  # fmt: skip
        loss = {
            "target": "lgvq_plugin.LGVQLoss",
            "params": {"lgvq": {"guide": {"use": "micro_clip", "max_length": 20}, **lgvq}},
        }
        whole = {
            "model": {
                "target": "torch.nn.Identity",
                "learning_rate": 0.1,
                "params": {"lossconfig": loss},
            },
            "data": {"batch_size": 2, "train": scenes[0], "validation": scenes[1]},
            "training": {"max_steps": 1},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(whole))
        return str(path)

    return write


MASKED = {"objectives": {"masked_text": {"weight": 0.05}}}


def captions():
    parts = [Scenes(split, size=16, length=6) for split in ("train", "validation")]
    return {text for part in parts for i in range(6) for text in part[i]["captions"]}


@pytest.mark.slow
def test_every_caption_is_there_and_the_overlay_finds_it(config, tmp_path, capsys):
    path, out = config(**MASKED), tmp_path / "cache"
    assert main(["cache", "-b", path, "-o", str(out), "--no-progress"]) == 0
    assert f"{len(captions()) + 1} different captions" in capsys.readouterr().out
    merged = Sections.from_config(read_config([path, out / "guide.yaml"]))
    block = parse(lgvq_block(merged.plain))
    cached = build_guide(block.guide)
    texts = sorted(captions())
    words = cached.encode(texts).word_ids
    mask = cached.draw_mask(
        texts, words, ratio=block.objectives.masked_text.ratio, generator=torch.Generator()
    )
    assert mask.any(dim=1).all()
    assert cached.encode(texts, token_mask=mask).tokens.isfinite().all()
    guide = build_guide({"use": "micro_clip", "max_length": 20})
    theirs, ours = guide.encode(texts), cached.encode(texts)
    real = theirs.attention_mask
    assert torch.cosine_similarity(ours.tokens[real], theirs.tokens[real]).min() > 0.99
    assert torch.cosine_similarity(ours.sentence, theirs.sentence).min() > 0.9999


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_more_data_adds(config, tmp_path, capsys):
    path, out = config(), tmp_path / "cache"
    given = ["cache", "-b", path, "-o", str(out), "--no-progress"]
    assert main(given) == 0
    before = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    assert main(given) == 0
    assert "0 of them new" in capsys.readouterr().out
    assert before == {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    assert main([*given, "data.train.params.length=9"]) == 0
    assert len(list(out.glob("shard-*"))) == 2


@pytest.mark.slow
def test_the_config_that_trains_can_make_the_cache(config, tmp_path):
    guide = {"use": "cached", "folder": str(tmp_path / "c"), "guide": {"use": "micro_clip"}}
    assert main(["cache", "-b", config(guide=guide), "--no-progress"]) == 0
    assert build_guide(guide).max_length == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lgvq", "expected"),
    [
        ({}, 0),  # no masked_text
        ({"recipe": "paper"}, 0),  # hides words behind the guide
        (MASKED, 2),
    ],
)
def test_maskings_are_made_only_where_they_are_needed(config, tmp_path, lgvq, expected):
    out = tmp_path / "c"
    given = ["cache", "-b", config(**lgvq), "-o", str(out), "--no-progress", "--maskings", "2"]
    assert main(given) == 0
    assert json.loads((out / "cache.json").read_text())["maskings"] == expected
    arrays = load_file(out / "shard-000000.safetensors")
    assert ("masks" in arrays) == bool(expected)


@pytest.mark.slow
def test_padding_can_be_left_out(config, tmp_path):
    for name, extra in (("a", []), ("b", ["--drop-padding"])):
        given = ["cache", "-b", config(), "-o", str(tmp_path / name), "--no-progress"]
        given += ["--precision", "float32"]
        assert main([*given, *extra]) == 0
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("shard-*")) for name in "ab"
    ]
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.slow
def test_wrong_input_is_one_message(config, tmp_path, capsys):
    path = config()
    assert main(["cache", "-b", path, "--maskings", "-1"]) == 2
    assert "--maskings must be >= 0" in capsys.readouterr().err
    assert main(["cache", "-b", "a=3"]) == 2
    assert "expected a YAML file" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["cache", "-b", path, "-o", str(tmp_path), "--no-progress"]) == 2
    assert "holds no text cache" in capsys.readouterr().err
    given = ["model.params.lossconfig.params.lgvq.guide.use=nonsense"]
    assert main(["cache", "-b", path, *given]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_reported_before(config, tmp_path, capsys, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    given = ["cache", "-b", config(), "-o", str(tmp_path / "c"), "--no-progress"]
    assert main(given) == 2
    assert "--drop-padding" in capsys.readouterr().err


def test_the_estimate_is_near_what_is_written(config, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "c"
    assert main(["cache", "-b", config(), "-o", str(out), "--no-progress"]) == 0
    message = next(m for m in caplog.messages if "takes at most" in m)
    amount, unit = message.split("at most ")[1].split()[:2]
    estimate = float(amount) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0.95 * written < estimate < 1.5 * written


@pytest.mark.slow
def test_captions_come_from_the_key_that_training_reads(config, tmp_path):
    path, out = config(caption_key="file"), tmp_path / "cache"
    assert main(["cache", "-b", path, "-o", str(out), "--no-progress"]) == 0
    files = {Scenes(split, size=16, length=6)[i]["file"]
             for split in ("train", "validation") for i in range(6)}  # fmt: skip
    cached = build_guide({"use": "cached", "folder": str(out)})
    assert len(cached) == len(files) + 1  # and the empty one
    cached.tokenize(sorted(files))  # raises for one that is not there
