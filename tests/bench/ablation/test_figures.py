"""The pictures for a README show what the numbers say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lgvq_plugin.bench.ablate import publish
from lgvq_plugin.bench.page import png_bytes

GREEN, RED, MAGENTA = (7, 133, 90), (179, 38, 63), (255, 0, 255)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(path, color):
    """(rows, columns) of the pixels that have a color, as shares of the picture."""
    image = pixels(path)
    found = np.abs(image - color).max(axis=2) < 6
    return [where / size for where, size in zip(np.nonzero(found), found.shape, strict=True)]


def with_values(results, variant, value):
    """All PSNR values of a variant are `value`, on every image."""

    def changed(run):
        if run.variant != variant or run.status != "done":
            return run
        row = run.evaluation["metrics"]["reconstruction/psnr"]
        row = {**row, "value": value, "per_image": [value] * row["n"]}
        return replace(run, evaluation={"metrics": {"reconstruction/psnr": row}})

    return replace(results, runs=tuple(changed(run) for run in results.runs))


@pytest.mark.slow
@pytest.mark.parametrize(("value", "good", "bad"), [(90.0, True, False), (1.0, False, True)])
def test_colors_are_the_verdicts(results, tmp_path, value, good, bad):
    only = tuple(run for run in results.runs if run.variant in ("baseline", "all"))
    shown = {name: results.variants[name] for name in ("baseline", "all")}
    results = replace(results, runs=only, variants=shown, references=("baseline",))
    publish(with_values(results, "all", value), tmp_path)
    assert (len(places(tmp_path / "numbers.png", GREEN)[0]) > 0) is good
    assert (len(places(tmp_path / "numbers.png", RED)[0]) > 0) is bad


@pytest.mark.slow
def test_a_variant_is_a_row_and_its_mean_is_where_the_axis_says(results, tmp_path):
    only = tuple(run for run in results.runs if run.variant in ("baseline", "all"))
    shown = {name: results.variants[name] for name in ("baseline", "all")}
    results = replace(results, runs=only, variants=shown, references=("baseline",))
    found = {}
    for value in (90.0, 1.0):
        publish(with_values(results, "all", value), tmp_path)
        color = GREEN if value > 20 else RED
        down, across = places(tmp_path / "numbers.png", color)
        found[value] = (np.median(down), across.min())
    assert found[90.0][0] == pytest.approx(found[1.0][0], abs=0.02)  # the same row
    assert found[1.0][1] + 0.05 < found[90.0][1]  # a larger value is further right


@pytest.mark.slow
def test_reconstructions_stand_in_the_row_of_their_variant(results, tmp_path):
    for run in results.runs:
        if run.variant == "all":
            for example in run.examples:
                pink = torch.tensor(MAGENTA)[:, None, None].expand(3, 8, 8).to(torch.uint8)
                (tmp_path / example["reconstruction"]).write_bytes(png_bytes(pink))
    publish(results, tmp_path)
    down, across = places(tmp_path / "images.png", MAGENTA)
    assert down.min() > 0.55  # original, baseline, paper, all: the last of four rows
    assert across.max() - across.min() > 0.7  # all three columns
    assert "![images.png](images.png)" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_each_data_set_has_its_own(results, tmp_path):
    runs = tuple(replace(run, data=name) for name in ("a", "b") for run in results.runs)
    publish(replace(results, runs=runs), tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"numbers_a.png", "numbers_b.png", "images_a.png", "images_b.png"}


def test_nothing_is_drawn_of_nothing(results, tmp_path):
    missing = tuple(replace(run, status="missing", examples=[]) for run in results.runs)
    publish(replace(results, runs=missing), tmp_path)
    assert not [*tmp_path.glob("*.png")]
    assert "![" not in (tmp_path / "report.md").read_text()
