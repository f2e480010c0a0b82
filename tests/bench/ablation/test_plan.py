"""A plan lists only what differs; everything else is the same, or it is refused."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lgvq_plugin.bench.plan import apply_changes, read_plan
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_dataset, build_host
from lgvq_plugin.training.config import Sections

PLANS = sorted((Path(__file__).parents[3] / "configs" / "ablation").glob("*.yaml"))
SMALL = {
    "model": {
        "target": "lgvq_plugin.hosts.vqvae.VQVAE",
        "learning_rate": 1e-3,
        "params": {
            "lossconfig": {"target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss"},
        },
    },
    "data": {"batch_size": 4, "train": {"target": "scenes", "params": {"length": 8}}},
    "training": {"max_steps": 2},
}


@pytest.fixture
def write(tmp_path):
    """A function that writes a plan over the small config and returns its path."""
    OmegaConf.save(OmegaConf.create(SMALL), tmp_path / "small.yaml")

    def build(**plan):
        path = tmp_path / "plan.yaml"
        OmegaConf.save(OmegaConf.create({"base": "small.yaml", **plan}), path)
        return path

    return build


def lgvq(job):
    return job.config["model"]["params"]["lossconfig"]["params"]["lgvq"]


FAST = ("recipes", "winner", "coco", "emoji")
LARGE = ("routes", "combos", "early", "photos", "pilot")
LARGE += ("emoji_combos", "emoji_pilot", "emoji_stop")  # these take the longest


def marks_of(path):
    marks = [pytest.mark.extended] * (path.stem in LARGE)
    return [*marks, pytest.mark.slow] if path.stem not in FAST else []


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=marks_of(path)) for path in PLANS],
)
def test_every_plan_of_ours_is_good(path):
    plan = read_plan(path, seeds=1)
    seeds, datasets = {job.seed for job in plan.jobs}, {job.data for job in plan.jobs}
    assert len(plan.jobs) == len(plan.variants) * len(seeds) * len(datasets)
    for job in plan.jobs:
        Sections.from_config(job.config)


def test_jobs_are_every_combination(write):
    path = write(
        seeds=[3, 5],
        data={"few": {}, "many": {"data.train.params.length": 16}},
        variants={"a": None, "b": {"training.ema_decay": 0.9}},
    )
    names = [job.name for job in read_plan(path).jobs]
    assert names == [f"{d}/{v}/seed_{s}" for d in ("few", "many") for v in "ab" for s in (3, 5)]


def test_the_seed_is_the_runs_and_the_heads(write):
    for job in read_plan(write(variants={"a": {}}), seeds=2).jobs:
        assert job.config["training"]["seed"] == job.seed
        assert lgvq(job)["seed"] == job.seed


def test_an_evaluation_may_name_variables_of_the_environment(write, monkeypatch):
    monkeypatch.setenv("SOME_GUIDE", "micro_clip")
    path = write(
        variants={"a": None}, evaluation={"guide": {"use": "${oc.env:SOME_GUIDE}"}, "limit": 4}
    )
    assert read_plan(path).jobs[0].evaluation == {"guide": {"use": "micro_clip"}, "limit": 4}


def test_dotted_keys_may_stand_at_any_depth():
    config = OmegaConf.create({"model": {"params": {"lossconfig": {"target": "a.B"}}}})
    changes = {"model.params": {"lossconfig.params": {"disc.start": 5}, "n_embed": 8}}
    params = apply_changes(config, changes).model.params
    assert params.lossconfig == {"target": "a.B", "params": {"disc": {"start": 5}}}
    assert params.n_embed == 8


def test_changes_nested_dotted_and_listed_are_the_same():
    base = OmegaConf.create(SMALL)
    nested = apply_changes(base, {"training": {"log_every": 3}, "lgvq": {"start": 5}})
    dotted = apply_changes(base, {"training.log_every": 3, "lgvq.start": 5})
    listed = apply_changes(
        base, ["training.log_every=3", "model.params.lossconfig.params.lgvq.start=5"]
    )
    assert nested == dotted == listed
    assert base == OmegaConf.create(SMALL)


def test_a_list_of_objectives_switches_the_others_off(write):
    (job,) = read_plan(write(variants={"a": {"objectives": "relationship"}}), seeds=1).jobs
    assert lgvq(job)["objectives"] == {
        "global_semantic": {"weight": 0.0},
        "masked_text": {"weight": 0.0},
        "vision_alignment": {"weight": 0.0},
    }
    with pytest.raises(ConfigError, match="masked_text has weight 0 in recipe corrected; set"):
        read_plan(write(variants={"a": {"objectives": "masked_text"}}), seeds=1)
    weight = {"lgvq.objectives.masked_text.weight": 0.1}
    read_plan(write(variants={"a": {"objectives": ["masked_text"], **weight}}), seeds=1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"variants": {"a": {}}, "seed": 3}, "no key 'seed'.*'seeds'"),
        ({"variants": {}}, "expected a mapping of names"),
        ({"variants": {"a/b": {}}}, "a name may contain only"),
        ({"variants": {"a": {}}, "baseline": "b"}, "no variant 'b'"),
        ({"variants": {"a": {}}, "seeds": 0}, "seeds: expected"),
        ({"variants": {"a": {}}, "seeds": 10**12}, "seeds: expected a number >= 1 and <= 1,000"),
        ({"variants": {"a": {}}, "seeds": True}, "seeds: expected"),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, "seeds: expected"),
        ({"variants": {"a": {"recipe": "papr"}}}, "plan.yaml: a: .*recipe"),
        ({"variants": {"a": {"lgvq": {"strat": 1}}}}, "did you mean 'start'"),
        ({"variants": {"a": {"objectives": ["masked"]}}}, "did you mean 'masked_text'"),
        ({"variants": {"a": {"modle": {}}}}, "did you mean 'model'"),
        ({"variants": {"a": {"base": "nowhere.yaml"}}}, "does not exist"),
        ({"variants": {"a": {"base": 5}}}, "base: expected the path of a config or a list, got 5"),
        (
            {"variants": {"a": {}}, "evaluation": {"text_to_image": {"images": 0}}},
            r"plan.yaml: evaluation.text_to_image.images: expected a whole number >= 2, got 0",
        ),
        (
            {"variants": {"a": {}}, "evaluation": {"masked_words": {"stepz": 9}}},
            r"evaluation.masked_words.stepz; did you mean 'steps'",
        ),
        ({"variants": {"a": {}, "b": {"training.max_steps": 9}}}, "must see the same batches"),
        ({"variants": {"a": {}, "b": {"data.batch_size": 2}}}, "must see the same batches"),
    ],
)
def test_errors_name_the_key_and_the_fix(write, plan, message):
    with pytest.raises(ConfigError, match=message):
        read_plan(write(**plan))


def test_a_control_may_be_of_another_length(write):
    longer = {"training.max_steps": 9, "other_batches": True}
    plan = read_plan(write(variants={"a": {}, "b": longer}), seeds=1)
    assert [job.config["training"]["max_steps"] for job in plan.jobs] == [2, 9]
    wrong = {"a": {}, "b": {"other_batches": "yes"}}
    with pytest.raises(ConfigError, match="b: other_batches: expected true or false, got 'yes'"):
        read_plan(write(variants=wrong))


def test_a_plan_extends_another(write, tmp_path):
    """Mappings are merged at any depth; lists, values and null replace what was there."""
    write(
        seeds=[1],
        config={"training": {"log_every": 3, "max_steps": 4}},
        variants={"a": {"note": "x", "lgvq": {"start": 1, "stop": 3}}, "b": {"recipe": "paper"}},
        evaluation={"metrics": ["psnr", "ssim"], "limit": 4},
    )
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: plan.yaml\nseeds: [7, 8]\nconfig: {training: {max_steps: 5}}\n"
        "variants: {a: {lgvq: {stop: 4}}, b: null, c: {recipe: corrected}}\n"
        "evaluation: {metrics: [psnr]}\n"
    )
    plan = read_plan(child)
    assert [job.name for job in plan.jobs] == [f"{v}/seed_{s}" for v in "abc" for s in (7, 8)]
    a, b, c = plan.jobs[::2]
    assert (a.config["training"]["log_every"], a.config["training"]["max_steps"]) == (3, 5)
    assert (lgvq(a)["start"], lgvq(a)["stop"], plan.variants["a"]["note"]) == (1, 4, "x")
    assert "recipe" not in lgvq(b)
    assert lgvq(c)["recipe"] == "corrected"
    assert a.evaluation == {"metrics": ["psnr"], "limit": 4}


def test_paths_of_an_extended_plan_are_relative_to_it(write, tmp_path):
    """`base:` of the parent, and of its variants, is found from a plan in another folder."""
    write(variants={"a": {"base": "small.yaml"}, "b": None})
    child = tmp_path / "mine" / "child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../plan.yaml\nseeds: 1\n")
    one, two = read_plan(child).jobs
    assert one.config["training"]["max_steps"] == two.config["training"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("parent", "extends", "message"),
    [
        ("seed: 3", "parent.yaml", r"parent\.yaml: no key 'seed'.*'seeds'"),
        ("base: [1]", "parent.yaml", r"parent\.yaml: base: expected the path of a config"),
        ("extends: child.yaml", "parent.yaml", r"parent\.yaml: extends: 'child.yaml' extends this"),
        ("seeds: 3", "child.yaml", r"child\.yaml: extends: 'child.yaml' extends this"),
        ("seeds: 3", "paren.yaml", r"paren\.yaml' does not exist; did you mean 'parent.yaml'"),
        ("seeds: 3", "[parent.yaml]", r"child\.yaml: extends: expected the path of one plan"),
    ],
)
def test_a_wrong_extends_is_refused(tmp_path, parent, extends, message):
    (tmp_path / "parent.yaml").write_text(parent)
    (tmp_path / "child.yaml").write_text(f"extends: {extends}\nvariants: {{a: null}}\n")
    with pytest.raises(ConfigError, match=message):
        read_plan(tmp_path / "child.yaml")


def test_lgvq_changes_need_a_loss_that_takes_them(write):
    loss = {"model.params.lossconfig.target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    with pytest.raises(ConfigError, match="takes none"):
        read_plan(write(config=loss, variants={"a": {"recipe": "paper"}}))


@pytest.mark.slow
def test_variants_of_a_seed_start_alike():
    """Same weights of the host, same samples in the same order."""
    path = next(path for path in PLANS if path.stem == "recipes")
    hosts, samples = [], []
    for job in read_plan(path, seeds=2).jobs[:3]:  # baseline of two seeds, LG-VQ of the first
        torch.manual_seed(job.seed)
        hosts.append(build_host(job.config).state_dict())
        dataset = build_dataset(Sections.from_config(job.config).data.train)
        samples.append([dataset[i]["caption"] for i in range(5)])
    plain, other, ours = hosts
    assert {key for key in ours if not key.startswith("loss.lgvq.")} == {*plain}
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    assert samples[0] == samples[2]
    weight = next(key for key in plain if key.startswith("encoder") and key.endswith("weight"))
    assert not torch.equal(plain[weight], other[weight])
