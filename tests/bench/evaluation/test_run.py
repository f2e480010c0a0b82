"""`lgvq eval` as a user meets it."""

import csv
import json
import os

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lgvq_plugin import cli
from lgvq_plugin.bench.evaluate import _parse, table


@pytest.fixture
def folder(tmp_path, config):
    """Two untrained hosts of different seeds as checkpoints, with their config inside."""
    params = {
        "lossconfig": {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"},
        "n_embed": 32,
        "embed_dim": 8,
        "channels": 8,
        "num_res_blocks": 1,
    }
    from lgvq_plugin.hosts.vqvae import VQVAE

    model = {"target": "lgvq_plugin.hosts.vqvae.VQVAE", "params": params, "learning_rate": 1e-3}
    whole = {**config, "model": model}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = VQVAE(**params).state_dict()
        torch.save({"state_dict": state}, tmp_path / f"host{seed}.ckpt")
    return tmp_path


def lgvq(folder, *argv):
    return cli.main(["eval", "-b", str(folder / "config.yaml"), "--no-progress", *map(str, argv)])


@pytest.mark.slow
def test_one_checkpoint(folder, capsys):
    out = folder / "out"
    argv = ["--ckpt", folder / "host0.ckpt", "--limit", 8, "--metrics", "psnr,usage"]
    files = ["--output", out, "--json", folder / "r.json", "--csv", folder / "r.csv"]
    assert lgvq(folder, *argv, *files, "--export", "npz") == 0
    shown = capsys.readouterr().out
    assert "reconstruction/psnr ↑" in shown
    assert "codebook/usage ↑" in shown
    result = json.loads((folder / "r.json").read_text())
    assert result == json.loads((out / "results.json").read_text())
    assert set(result) == {"settings", "environment", "metrics", "skipped"}
    assert result["settings"]["evaluation"]["limit"] == 8
    rows = list(csv.DictReader((folder / "r.csv").read_text().splitlines()))
    assert {row["metric"] for row in rows} == set(result["metrics"])
    assert float(rows[0]["value"]) == result["metrics"][rows[0]["metric"]]["value"]
    for name in ("reconstructions.png", "usage.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    reals = np.load(out / "export" / "reals.npz")["arr_0"]
    assert reals.shape == (8, 32, 32, 3)
    assert reals.dtype == np.uint8


def test_checkpoints_may_be_given_together_or_one_by_one():
    together, apart = (_parse(words.split())[0] for words in ("--ckpt a b", "--ckpt a --ckpt b"))
    assert together.ckpt == apart.ckpt == ["a", "b"]


@pytest.mark.slow
def test_two_checkpoints_side_by_side(folder, capsys):
    out = folder / "both"
    ckpts = ["--ckpt", folder / "host0.ckpt", folder / "host1.ckpt", "--names", "old", "new"]
    assert lgvq(folder, *ckpts, "--limit", 8, "--metrics", "psnr", "--output", out) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert head == ["metric", "n", "old", "new"]
    result = json.loads((out / "results.json").read_text())["hosts"]
    values = [result[n]["metrics"]["reconstruction/psnr"]["value"] for n in ("old", "new")]
    assert values[0] != values[1]
    assert (out / "old" / "metrics" / "psnr.json").is_file()
    assert (out / "reconstructions.png").is_file()


def test_options_alone_take_the_data_of_the_checkpoint(folder):
    options = folder / "options.yaml"
    options.write_text("evaluation: {limit: 5}\n")
    content = torch.load(folder / "host0.ckpt", weights_only=True)
    content["lgvq_training"] = {"config": yaml.safe_load((folder / "config.yaml").read_text())}
    torch.save(content, folder / "run.ckpt")
    out = folder / "options"
    argv = ["eval", "-b", options, "--ckpt", folder / "run.ckpt", "--output", out]
    assert cli.main([*map(str, argv), "--metrics", "psnr", "--no-progress"]) == 0
    result = json.loads((out / "results.json").read_text())
    assert result["metrics"]["reconstruction/psnr"]["n"] == 5


@pytest.mark.slow
def test_exported_png_equal_the_npz(folder):
    argv = ["--ckpt", folder / "host0.ckpt", "--limit", 3, "--metrics", "psnr", "--output"]
    lgvq(folder, *argv, folder / "a", "--export", "npz")
    lgvq(folder, *argv, folder / "b", "--export", "png")
    pictures = sorted((folder / "b/export/reconstructions").glob("*.png"))
    array = np.load(folder / "a/export/reconstructions.npz")["arr_0"]
    assert len(pictures) == 3
    for path, wanted in zip(pictures, array, strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), wanted)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--ckpt", "HOST", "--metrics", "psnr,fidd"], "did you mean 'fid'"),
        (["--ckpt", "HOST", "--names", "a", "b"], "--names"),
        (["--ckpt", "HOST", "--device", "toaster"], "--device"),
        (["--ckpt", "HOST", "--device", "cuda:99"], "--device cpu"),
        (["--ckpt", "HOST", "evaluation.limt=3"], "limit"),
        (["--ckpt", "CONFIG"], "config.yaml' is a config, not a checkpoint; give it with -b"),
    ],
)
def test_wrong_input_is_one_message_and_2(folder, capsys, argv, message):
    files = {"HOST": folder / "host0.ckpt", "CONFIG": folder / "config.yaml"}
    argv = [files.get(word, word) for word in argv]
    assert lgvq(folder, *argv) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_the_best_of_several_is_marked():
    def row(value, better):
        return {"value": value, "n": 4, "unit": "", "higher_is_better": better}

    results = {
        "a": {"metrics": {"x": row(1.5, True), "y": row(1.5, False), "z": row(1.5, None)}},
        "b": {"metrics": {"x": row(2.5, True), "y": row(2.5, False)}, "skipped": {"w": "why"}},
    }
    lines = {line.split()[0]: line for line in table(results).splitlines()[1:4]}
    assert lines["x"].rstrip().endswith("2.5000 *")
    assert "1.5000 *" in lines["y"]
    assert "*" not in lines["z"]
    assert lines["z"].rstrip().endswith("-")
    assert "b: w skipped: why" in table(results)


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(folder, capsys, monkeypatch):
    from lgvq_plugin.bench import evaluation

    def interrupted(context):
        raise KeyboardInterrupt

    usage = evaluation.METRICS["usage"]
    argv = ["--ckpt", folder / "host0.ckpt", "--limit", 4, "--output", folder / "cut"]
    monkeypatch.setitem(evaluation.METRICS, "usage", interrupted)
    assert lgvq(folder, *argv, "--metrics", "psnr,usage") == 130
    assert "run the same command to continue" in capsys.readouterr().err
    monkeypatch.setitem(evaluation.METRICS, "usage", usage)
    monkeypatch.setitem(evaluation.METRICS, "psnr", interrupted)  # must not be computed again
    assert lgvq(folder, *argv, "--metrics", "psnr,usage") == 0
    assert "reconstruction/psnr" in capsys.readouterr().out


def test_a_file_at_json_is_kept_without_force(folder, capsys):
    (folder / "mine.json").write_text("{}")
    argv = ["--ckpt", folder / "host0.ckpt", "--json", folder / "mine.json"]
    assert lgvq(folder, *argv) == 2
    assert "exists already; --force overwrites it" in capsys.readouterr().err
    assert (folder / "mine.json").read_text() == "{}"


@pytest.mark.slow
def test_a_run_that_cannot_be_written_to_is_evaluated(folder, monkeypatch, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    run = folder / "run=1"
    run.mkdir()
    checkpoint = (folder / "host0.ckpt").rename(run / "step=3.ckpt")
    may_write = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run and may_write(path, mode))
    assert lgvq(folder, "--ckpt", checkpoint, "--limit", 8, "--metrics", "psnr") == 0
    assert (here / "lgvq_evaluation" / "step=3" / "results.json").is_file()
    assert [file.name for file in run.iterdir()] == ["step=3.ckpt"]


def test_helper_keys_of_the_config_are_resolved(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["width"] = config["model"]["params"]["channels"]
    config["model"]["params"]["channels"] = "${width}"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["--ckpt", folder / "host0.ckpt", "--limit", 4, "--metrics", "psnr", "-o", folder / "o"]
    assert lgvq(folder, *argv) == 0


@pytest.mark.slow
def test_too_few_training_images_skip_the_probes_alone(folder, capsys):
    argv = ["--ckpt", folder / "host0.ckpt", "--limit", 2, "--metrics", "psnr,retrieval"]
    assert lgvq(folder, *argv, "-o", folder / "o") == 0
    shown = capsys.readouterr().out
    assert "reconstruction/psnr" in shown
    assert "retrieval skipped: a probe needs at least 10 training images" in shown


def test_one_reason_for_several_metrics_is_told_once(folder, capsys):
    argv = ["--ckpt", folder / "host0.ckpt", "--metrics", "psnr,ssim", "-o", folder / "o"]
    words = ["data.validation.target=nowhere.Photos", "data.test.target=nowhere.Photos"]
    assert lgvq(folder, *argv, *words) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.count("nowhere.Photos") == 1
    assert "psnr, ssim: " in shown
    assert "--data FOLDER" in shown


def test_an_evaluation_section_that_is_no_mapping_is_named(folder, capsys):
    assert lgvq(folder, "--ckpt", folder / "host0.ckpt", "-o", folder / "o", "evaluation=5") == 2
    assert "evaluation: expected a mapping, got 5" in capsys.readouterr().err
