"""Every YAML of configs/ loads, pairs differ in one line, and no knob is idle."""

import csv
import inspect
import re
from dataclasses import fields
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import pytest
from omegaconf import OmegaConf

import lgvq_plugin
from lgvq_plugin.bench.demo import PLAN as DEMO_PLAN
from lgvq_plugin.bench.plan import read_plan
from lgvq_plugin.bench.statistics import Spread, benjamini_hochberg
from lgvq_plugin.sockets import import_target, resolve
from lgvq_plugin.training.config import Sections, read_config
from lgvq_plugin.training.run import MACHINE
from lgvq_plugin.training.settings import TrainingConfig

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = ["guide_micro_clip", "guide_minilm", "paper", "recipe_v1"]
PAIRS = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if (CONFIGS / f"{path.stem}_lgvq.yaml").exists()
)
FULL = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OVERLAYS)


def load(stem):
    config = read_config([CONFIGS / f"{stem}.yaml"])
    for part in ("train", "validation"):
        if OmegaConf.is_missing(config.data[part].params, "root"):
            config.data[part].params.root = "/somewhere"
    return config


def test_there_are_pairs():
    assert {"vqgan_scenes_64", "vqgan_folder_128", "vqgan_coco_256", "vqvae_scenes_64"} <= {*PAIRS}


@pytest.mark.parametrize("stem", PAIRS)
def test_lgvq_is_one_line(stem):
    before, after = (
        (CONFIGS / f"{name}.yaml").read_text().splitlines() for name in (stem, f"{stem}_lgvq")
    )
    assert len(before) == len(after)
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert all(line.strip().startswith("target: ") for line in changed[0])
    old = read_config([CONFIGS / f"{stem}.yaml"]).model.params.lossconfig.target
    assert changed[0][0].strip() == f"target: {old}"


@pytest.mark.parametrize("stem", FULL)
def test_a_config_is_complete(stem):
    sections = Sections.from_config(load(stem))
    assert sections.data.validation is not None
    assert sections.learning_rate(1) > 0


@pytest.mark.parametrize("stem", FULL)
def test_targets_exist_and_take_their_params(stem):
    from lgvq_plugin import compat

    compat.patch()
    sections = Sections.from_config(load(stem))
    loss = sections.model["params"]["lossconfig"]
    import_target(loss["target"])
    inspect.signature(import_target(sections.model["target"])).bind(**sections.model["params"])
    for data in (sections.data.train, sections.data.validation):
        inspect.signature(resolve("datasets", data["target"])).bind(**data["params"])


@pytest.mark.parametrize("stem", PAIRS)
def test_the_base_loss_takes_the_params(stem):
    from lgvq_plugin import compat

    compat.patch()
    loss = Sections.from_config(load(stem)).model["params"]["lossconfig"]
    inspect.signature(import_target(loss["target"])).bind(**loss["params"])


def test_the_papers_numbers():
    config = load("vqgan_coco_256_lgvq")
    params = config.model.params
    assert (params.n_embed, params.embed_dim, params.ddconfig.ch) == (1024, 256, 128)
    assert 256 // 2 ** (len(params.ddconfig.ch_mult) - 1) == 16  # tokens a side
    assert Sections.from_config(config).learning_rate(1) == pytest.approx(3.6e-5)


def test_the_overlay_names_the_embedded_guide():
    config = read_config([CONFIGS / "vqgan_scenes_64_lgvq.yaml", CONFIGS / "guide_micro_clip.yaml"])
    assert config.model.params.lossconfig.params.lgvq == {"guide": {"use": "micro_clip"}}
    assert config.model.params.lossconfig.params.disc_start == 200


def test_the_demo_trains_the_default_recipe():
    job = next(job for job in read_plan(DEMO_PLAN).jobs if job.variant == "lgvq")
    block = job.config["model"]["params"]["lossconfig"]["params"]["lgvq"]
    assert block == {"guide": {"use": "micro_clip"}, "seed": 0}


RESULTS = CONFIGS / "ablation" / "RESULTS.md"
MEASURED = re.findall(r"\[values\]\(results/(\w+)_values\.csv\)", RESULTS.read_text())


@pytest.mark.parametrize("plan", MEASURED)
def test_the_tables_of_results_are_those_of_the_csv(plan):
    """Means are rounded, never edited; marks follow the corrected verdicts, or the intervals."""
    folder, seeds, found = RESULTS.parent / "results", {}, {}
    with (folder / f"{plan}_values.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["data"], row["variant"], row["metric"]
            seeds.setdefault(key, []).append(float(row["value"]))
    with (folder / f"{plan}_differences.csv").open() as file:
        for row in csv.DictReader(file):
            if row["reference"] == "baseline":
                found[row["data"], row["variant"], row["metric"]] = row
    section = RESULTS.read_text().split(f"results/{plan}_values.csv")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert rows
    for metric, *cells in rows:
        for head, cell in zip(heads[1:], cells, strict=True):
            if "interval" in head or cell == "–":
                continue
            *data, variant = head.split(", ")
            key = "".join(data).lower(), variant, re.split(r" [(↑↓]", metric)[0]
            shown = cell.split()[0].replace("−", "-")
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(fmean(seeds[key]), abs=0.501 * 10**-digits), key
            mark = mark_of(found[key], is_higher_better="↑" in metric) if key in found else ""
            assert "".join(re.findall("[▲▼△▽]", cell)) == mark, key


def mark_of(row, *, is_higher_better):
    if row["verdict"] or not row["p_adjusted"]:
        return {"better": "▲", "worse": "▼", "": ""}[row["verdict"]]
    if float(row["low"]) <= 0 <= float(row["high"]):
        return ""
    return "△" if (float(row["value"]) > 0) == is_higher_better else "▽"


@pytest.mark.parametrize(
    "plan", [p for p in MEASURED if not p.startswith(("default_", "confirm_"))]
)
def test_the_p_values_of_results_are_those_of_the_seeds_and_intervals(plan):
    """The derivation that RESULTS.md describes: exact for seeds, else an upper bound.

    Those of the default recipe are from values per image, which are not in the repository.
    """
    folder, values = RESULTS.parent / "results", {}
    with (folder / f"{plan}_values.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["data"], row["variant"], row["metric"]
            values.setdefault(key, {})[row["seed"]] = float(row["value"])
    with (folder / f"{plan}_differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if not row["low"]:
            assert row["p"] == row["verdict"] == ""
            continue
        own, other = (
            values[row["data"], row[name], row["metric"]] for name in ("variant", "reference")
        )
        differences = np.array([own[s] - other[s] for s in own if s in other])
        count = len(differences)
        of_seeds = differences.var(ddof=1) / count if count > 1 else 0.0
        half_width = (float(row["high"]) - float(row["low"])) / 2
        of_images = (half_width / NormalDist().inv_cdf(0.975)) ** 2 if row["images"] else 0.0
        spread = Spread(
            seeds=np.array(of_seeds),
            seed_degrees=count - 1,
            images=np.array(of_images),
            image_degrees=int(row["images"] or 1) - 1,
        )
        expected = float(spread.p_value(differences.mean()))
        assert float(row["p"]) == pytest.approx(expected, rel=1e-6, abs=1e-12), row
    judged = [row for row in rows if row["p_adjusted"]]
    adjusted = benjamini_hochberg([float(row["p"]) for row in judged])
    assert [float(row["p_adjusted"]) for row in judged] == pytest.approx(adjusted)
    for row in rows:
        is_marked = row["p_adjusted"] != "" and float(row["p_adjusted"]) <= 0.05
        assert bool(row["verdict"]) == is_marked, row


def test_results_and_readme_name_plans_and_files_that_exist():
    for path in (RESULTS, CONFIGS.parent / "README.md"):
        text = path.read_text()
        for plan in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (CONFIGS.parent / plan).is_file(), f"{path.name}: {plan}"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    cited = {path.stem for path in (CONFIGS / "ablation").glob("*.yaml")}
    text = RESULTS.read_text() + (CONFIGS.parent / "README.md").read_text()
    uncited = {stem for stem in cited if f"{stem}.yaml" not in text}
    assert {stem for stem in uncited if not stem.startswith("base_")} == set()


def test_every_knob_of_training_is_read():
    package = Path(lgvq_plugin.__path__[0])
    code = "\n".join(
        path.read_text() for path in package.rglob("*.py") if path.name != "settings.py"
    )
    for field in fields(TrainingConfig):
        is_read = re.search(rf"(settings|training)\.{field.name}\b", code)
        assert is_read or field.name in MACHINE, field.name


def test_every_knob_of_training_is_told():
    source = inspect.getsource(TrainingConfig)
    for field in fields(TrainingConfig):
        assert re.search(rf'\n    {field.name}: .*\n    """', source), field.name
