"""evaluate(): sanity lines that theory gives, resume, and what a user gets told."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lgvq_plugin.bench import evaluation
from lgvq_plugin.bench.evaluate import OLD_NAMES, EvaluationConfig, names_of
from lgvq_plugin.bench.evaluation import evaluate
from lgvq_plugin.bench.probes.classifiers import CONFIG, ImageJudge
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError

SCORERS = "needs pycocoevalcap (extra eval)"
TINY = {"steps": 3, "width": 16, "heads": 1, "depth": 1, "batch_size": 16}


def value(result, name):
    return result["metrics"][name]["value"]


def test_an_identity_tokenizer_is_perfect(identity, config, shared):
    weights = str(shared / "lpips_squeeze_real" / "squeezenet1_1_features_fp32.npz")
    block = {
        "lpips": {"net": "squeeze", "backbone": weights},
        "fd": {"net": "squeeze", "weights": weights},
    }
    options = {**config["evaluation"], **block}
    names = ["psnr", "ssim", "lpips", "fd"]
    result = evaluate(identity, config, metrics=names, limit=16, options=options, progress=False)
    assert value(result, "reconstruction/psnr") == 100
    assert value(result, "reconstruction/ssim") == pytest.approx(1, abs=1e-6)
    assert value(result, "reconstruction/lpips_squeeze") == pytest.approx(0, abs=1e-7)
    assert value(result, "reconstruction/fd_squeeze") == pytest.approx(0, abs=1e-3)
    row = result["metrics"]["reconstruction/fd_squeeze"]
    assert row["n"] == 16
    assert row["settings"]["quantization"] == "uint8"
    assert len(row["settings"]["weights"]) == 16
    assert row["settings"]["reference"]["set"]["params"]["split"] == "validation"
    assert not any("fid" in name for name in result["metrics"])


def test_the_rows_equal_numpy(palette, config):
    result = evaluate(palette, config, metrics=["psnr", "usage"], limit=12, progress=False)
    data = Scenes("validation", size=32, length=48)
    images = torch.stack([torch.from_numpy(data[i]["image"]).permute(2, 0, 1) for i in range(12)])
    given, _ = palette(images)
    a, b = (
        np.clip(np.rint((x.double().numpy() + 1) * 127.5), 0, 255) / 255 for x in (images, given)
    )
    psnr = -10 * np.log10(((a - b) ** 2).mean((1, 2, 3)))
    row = result["metrics"]["reconstruction/psnr"]
    np.testing.assert_allclose(row["per_image"], psnr, atol=1e-3)
    assert row["value"] == pytest.approx(psnr.mean(), abs=1e-3)
    assert (row["unit"], row["n"], row["higher_is_better"]) == ("dB", 12, True)
    indices = palette.encode(images)[2][2].numpy()
    assert value(result, "codebook/usage") == len(np.unique(indices)) / 64
    assert value(result, "codebook/dead_codes") == 64 - len(np.unique(indices))


@pytest.mark.slow
def test_an_untrained_tokenizer_is_near_chance_and_the_palette_is_not(untrained, palette, config):
    names = ["retrieval", "attributes"]
    low, high = (
        evaluate(host, config, metrics=names, progress=False) for host in (untrained, palette)
    )
    chance = value(low, "retrieval/chance@1")
    assert chance == pytest.approx(1 / 48, abs=0.01)
    name = "attributes/linear/background_color/accuracy"
    assert value(high, name) > value(low, "attributes/linear/background_color/majority") + 0.1
    shuffled = value(high, "attributes/linear/shuffled/mean_accuracy")
    assert value(high, "attributes/linear/mean_accuracy") > shuffled + 0.05


@pytest.mark.slow
def test_words_go_together_with_codes_but_not_with_others(palette, config):
    data = config["data"]
    data["train"]["params"]["length"] = 400
    result = evaluate(palette, config, metrics=["words", "relation"], progress=False)
    assert value(result, "words/codes_with_a_word") > 0.3
    assert value(result, "words/shuffled/codes_with_a_word") < 0.1
    assert result["metrics"]["words/shuffled/strength"]["higher_is_better"] is None
    assert 0 <= value(result, "relation/mse") < 4


@pytest.mark.slow
def test_few_shot_results_are_means_over_sets_of_images(palette, config):
    def row(count, **options):
        options = {**config["evaluation"], "few_shot": count, **options}
        given = {"metrics": ["attributes"], "options": options, "progress": False}
        result = evaluate(palette, config, **given)["metrics"]
        return result["attributes/few_shot/main_color/accuracy"]

    one, two, three = (row(16, few_shot_draws=draws) for draws in (1, 2, 3))
    assert (one["settings"]["draws"], three["settings"]["draws"]) == (1, 3)
    images = one["n"]
    second = 2 * np.array(two["per_image"]) - one["per_image"]
    third = 3 * np.array(three["per_image"]) - 2 * np.array(two["per_image"])
    for answers in (second, third):  # of one set alone: right or wrong, and not as the first set's
        assert set(answers.round(3)) == {0, 1}
        assert (answers.round() != one["per_image"]).any()
    total = one["value"] * images + second.sum() + third.sum()
    assert three["value"] == pytest.approx(total / 3 / images, abs=1e-5)
    everything = row(400, few_shot_draws=5)
    assert everything["settings"]["draws"] == 1  # all images each time
    with pytest.raises(ConfigError, match="few_shot_draws: expected a whole number >= 1, got 0"):
        row(16, few_shot_draws=0)


@pytest.mark.slow
def test_masked_words_without_the_leaky_protocol(palette, config):
    def names(**probe):
        config["evaluation"] |= {"masked_words": {**TINY, **probe}}
        found = evaluate(palette, config, metrics=["masked_words"], limit=16, progress=False)
        return {name.split("/")[1] for name in found["metrics"]}

    assert names() == {"leak_free", "leaky"}
    assert names(leaky=False) == {"leak_free"}


def tasks(config):
    block = {"masked_words": TINY, "captioning": TINY, "vqa": TINY}
    config["evaluation"] |= {**block, "text_to_image": {**TINY, "images": 8}}
    return [*block, "text_to_image"]


def has_mean_of_its_images(result, name, count):
    row = result["metrics"][name]
    assert len(row["per_image"]) == count, name
    assert np.mean(row["per_image"]) == pytest.approx(row["value"], abs=2e-6), name


@pytest.mark.slow
def test_all_tasks_run(palette, config, monkeypatch):
    """With values of each image, and with a reason where a metric is left out."""
    pytest.importorskip("pycocoevalcap", reason=SCORERS)
    monkeypatch.setenv("PATH", "")  # no Java: METEOR takes longer than all the rest
    hasty = partial(ImageJudge.train_on, config=replace(CONFIG, steps=5))
    monkeypatch.setattr(ImageJudge, "train_on", hasty)
    names = tasks(config)
    first = evaluate(palette, config, metrics=names, limit=16, progress=False)
    found = set(first["metrics"])
    wanted = {
        "masked_words/leak_free/mask_1/recall@1",
        "masked_words/leaky/mask_3/recall@5",
        "caption/bleu_4",
        "caption/shuffled/cider_d",
        "vqa/accuracy/color",
        "vqa/majority/accuracy",
        "t2i/bits_per_code",
        "t2i/real/judge/mean",
        "t2i/fd_judge",
    }
    assert wanted <= found, (sorted(wanted - found), first["skipped"])
    bits = [value(first, f"t2i/{name}bits_per_code") for name in ("without_text/", "")]
    assert value(first, "t2i/text_gain") == pytest.approx(bits[0] - bits[1])
    of_images = {
        "masked_words": ["leak_free/mask_1/recall@1", "leaky/mask_3/recall@5"],
        "caption": ["cider_d", "rouge_l"],
        "t2i": ["bits_per_code", "text_gain"],
    }
    for task, rows in of_images.items():
        for name in rows:
            has_mean_of_its_images(first, f"{task}/{name}", 16)
    for name, row in first["metrics"].items():  # no means over images
        assert "per_image" not in row or "bleu" not in name
    assert "Java" in first["skipped"]["caption/meteor"]
    assert "evaluation.clip_score" in first["skipped"]["t2i/clip_score"]
    assert not any("clip" in name or "meteor" in name for name in found)


@pytest.mark.slow
def test_tasks_without_text_run(palette, config, monkeypatch):
    """Synthesis, completion and grounding, on scenes; each with its control."""
    hasty = partial(ImageJudge.train_on, config=replace(CONFIG, steps=5))
    monkeypatch.setattr(ImageJudge, "train_on", hasty)
    small = {**TINY, "images": 8}
    blocks = {"unconditional": small, "class_to_image": small, "semantic_to_image": small}
    config["evaluation"] |= {**blocks, "grounding": {"steps": 5}}
    names = [*blocks, "completion", "grounding"]
    found = evaluate(palette, config, metrics=names, limit=16, progress=False)
    wanted = {f"{name}/{part}" for name in (*blocks, "completion")
              for part in ("bits_per_code", "fd_judge", "reconstructed/fd_judge")}  # fmt: skip
    wanted |= {f"{name}/{part}" for name in ("class_to_image", "semantic_to_image")
               for part in ("judge/mean", "shuffled/bits_per_code", "gain")}  # fmt: skip
    wanted |= {f"grounding/{part}" for part in ("pointing", "iou", "accuracy@0.5",
               "chance/pointing", "shuffled/pointing")}  # fmt: skip
    assert wanted <= set(found["metrics"]), (wanted - set(found["metrics"]), found["skipped"])
    is_better = {name: found["metrics"][name]["higher_is_better"] for name in wanted}
    assert is_better["completion/bits_per_code"] is False
    assert is_better["semantic_to_image/gain"] is is_better["grounding/iou"] is True
    assert (
        is_better["grounding/chance/pointing"] is is_better["grounding/shuffled/pointing"] is None
    )
    for name in ("completion/bits_per_code", "class_to_image/gain", "grounding/pointing"):
        has_mean_of_its_images(found, name, 16)


def test_tasks_that_need_places_say_so(palette, tmp_path, config):
    for index in range(24):
        image = Image.fromarray(np.full((32, 32, 3), 10 * index, np.uint8))
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a red star")
    section = {"target": "folder", "params": {"root": str(tmp_path), "size": 32}}
    config["data"] |= {"train": section, "validation": section}
    names = ["psnr", "grounding", "semantic_to_image", "class_to_image"]
    found = evaluate(palette, config, metrics=names, progress=False)["skipped"]
    assert "layout_of(index)" in found["grounding"] == found["semantic_to_image"]
    assert "has no labels" in found["class_to_image"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric",
    [
        "masked_words",
        *(
            pytest.param(name, marks=pytest.mark.extended)
            for name in ("captioning", "vqa", "text_to_image")
        ),
    ],
)
def test_a_task_is_the_same_again(palette, config, metric):
    if metric == "captioning":
        pytest.importorskip("pycocoevalcap", reason=SCORERS)
    tasks(config)
    first, again = (
        evaluate(palette, config, metrics=[metric], limit=24, progress=False) for _ in range(2)
    )
    assert json.dumps(first["metrics"]) == json.dumps(again["metrics"])
    if metric == "captioning" and shutil.which("java"):
        assert 0 <= value(first, "caption/meteor") <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the file: expected a mapping of mark, rows"),
        ('{"mark": "x"}', "the file: expected a mapping with 'rows'"),
        ('{"mark": "x", "rows": {"a": 1}}', r"the file\.rows\.a: expected a mapping of value"),
        (
            '{"mark": "x", "rows": {"a": {"value": "<b>", "n": 1}}}',
            r"rows\.a\.value: expected a num",
        ),
        ('{"mark": "x", "ro', "cannot be read as JSON"),
    ],
)
def test_a_changed_file_of_a_metric_is_refused_by_its_key(palette, config, tmp_path, text, message):
    keys = {"metrics": ["usage"], "limit": 8, "output": tmp_path, "progress": False}
    evaluate(palette, config, **keys)
    file = tmp_path / "metrics" / "usage.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"usage\.json: .*{message}.*delete the file"):
        evaluate(palette, config, **keys)
    assert file.read_text() == text


def test_finished_metrics_are_not_computed_again(palette, config, tmp_path, monkeypatch):
    calls = []

    def counted(context):
        calls.append(context.config.seed)
        return usage(context)

    usage = evaluation.METRICS["usage"]
    monkeypatch.setitem(evaluation.METRICS, "usage", counted)
    keys = {"limit": 8, "output": tmp_path, "progress": False}
    first = evaluate(palette, config, metrics=["usage"], **keys)
    second = evaluate(palette, config, metrics=["usage"], **keys)
    assert first == second
    assert len(calls) == 1
    evaluate(palette, config, metrics=["usage"], **{**keys, "limit": 9})
    assert len(calls) == 2
    palette.quantize.embedding.weight.data += 0.01
    evaluate(palette, config, metrics=["usage"], **{**keys, "limit": 9})
    assert len(calls) == 3
    block = {**config["evaluation"], "captioning": {"steps": 5}}
    evaluate(palette, config, metrics=["usage"], options=block, **{**keys, "limit": 9})
    assert len(calls) == 3  # another metric's key


def test_what_cannot_be_computed_is_told_and_the_rest_is_done(palette, config):
    config["evaluation"]["lpips"] = {"backbone": "/nowhere/alex.pth"}
    result = evaluate(palette, config, metrics=["psnr", "lpips"], limit=4, progress=False)
    assert "reconstruction/psnr" in result["metrics"]
    assert "/nowhere/alex.pth" in result["skipped"]["lpips"]
    with pytest.raises(ConfigError, match="no metric could be computed"):
        evaluate(palette, config, metrics=["lpips"], limit=4, progress=False)


@pytest.mark.parametrize(
    ("block", "metrics", "message"),
    [
        ({}, ["psnrr"], "did you mean 'psnr'"),
        ({"limt": 3}, ["psnr"], r"evaluation\.limt; did you mean 'limit'"),
        ({"limit": 1}, ["psnr"], r"evaluation\.limit"),
        ({"captioning": {"stepz": 1}}, ["captioning"], r"evaluation\.captioning\.stepz"),
        (
            {"text_to_image": {"sampling": {"top_p": 2}}},
            ["text_to_image"],
            r"evaluation\.text_to_image\.sampling\.top_p",
        ),
        ({"tokenizer": "bpe"}, ["psnr"], "words or ptb"),
    ],
)
def test_wrong_input_is_told(palette, config, block, metrics, message):
    config["evaluation"] |= block
    with pytest.raises(ConfigError, match=message):
        evaluate(palette, config, metrics=metrics, progress=False)


def test_a_wrong_key_of_the_last_probe_is_told_before_the_first_is_trained(
    palette, config, tmp_path
):
    config["evaluation"] |= {"masked_words": TINY, "text_to_image": {"stepz": 1}}
    names = ["psnr", "masked_words", "text_to_image"]
    with pytest.raises(
        ConfigError, match=r"evaluation\.text_to_image\.stepz; did you mean 'steps'"
    ):
        evaluate(palette, config, metrics=names, output=tmp_path, progress=False)
    assert not [*tmp_path.rglob("*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ("retrieval", ["image_to_text/recall@5", "text_to_image/mean_rank"]),
        ("attributes", ["linear/mean_accuracy", "few_shot/main_color/accuracy"]),
    ],
)
def test_values_of_each_image_have_the_mean_that_is_told(palette, config, metric, names):
    result = evaluate(palette, config, metrics=[metric], limit=16, progress=False)
    for name in names:
        has_mean_of_its_images(result, f"{metric}/{name}", 16)
    for name, row in result["metrics"].items():  # no mean over images
        assert "per_image" not in row or "auc" not in name


def test_sections_that_are_missing_are_told(palette, config):
    with pytest.raises(ConfigError, match="no section `data:`"):
        evaluate(palette, {}, progress=False)
    with pytest.raises(ConfigError, match="`test:` or a `validation:`"):
        evaluate(palette, {"data": {"train": config["data"]["train"]}}, progress=False)


def test_old_names_still_work_with_a_warning():
    for old, new in OLD_NAMES.items():
        with pytest.warns(DeprecationWarning, match=f"{old!r} is deprecated; use {new!r}"):
            assert names_of([old]) == [new]
        with pytest.warns(DeprecationWarning, match=f"use {new!r}"):
            block = EvaluationConfig.from_dict({new: {"steps": 3}, old: {"width": 8, "heads": 2}})
        assert getattr(block, new) == {"steps": 3, "width": 8, "heads": 2}


def test_words_of_captions_stand_in_for_labels(palette, config, tmp_path):
    rows = []
    for number in range(80):
        name = ("red", "blue", "white")[number % 3]
        shade = {"red": (200, 0, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}[name]
        Image.new("RGB", (32, 32), shade).save(tmp_path / f"{number}.png")
        rows.append({"file": f"{number}.png", "text": f"the picture of it is {name}"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params = {"root": str(tmp_path), "size": 32}
    data = {
        "train": {"target": "folder", "params": {**params, "split": "train"}},
        "validation": {"target": "folder", "params": {**params, "split": "validation"}},
    }
    with pytest.raises(ConfigError, match=r"has no labels .* evaluation\.attribute_words"):
        evaluate(palette, {**config, "data": data}, metrics=["attributes"], progress=False)
    options = {**config["evaluation"], "attribute_words": 3, "few_shot": 12}
    given = {**config, "data": data}
    result = evaluate(palette, given, metrics=["attributes"], options=options, progress=False)
    for probe in ("linear", "few_shot"):
        # "picture" is everywhere, "the" tells nothing: the three colors are left, and are seen.
        assert value(result, f"attributes/{probe}/words/auc") == 1
        assert value(result, f"attributes/{probe}/words/accuracy") == 1
        row = result["metrics"][f"attributes/{probe}/words/accuracy"]
        assert row["n"] == len(row["per_image"]) > 2
