"""A metric and a probe of another package, named by path or entry point, with no edit of ours."""

import csv
import json
import sys

import pytest
import torch
import yaml

from lgvq_plugin import cli
from lgvq_plugin.bench.evaluate import EvaluationConfig
from lgvq_plugin.bench.evaluation import evaluate
from lgvq_plugin.bench.plan import read_plan
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError

MODULE = """
import torch
from lgvq_plugin.bench.measures import Row, rows_of
from lgvq_plugin.bench.probes import AbstractProbe


def error(context, *, power=1, scale=1.0):
    parts = [((a - b).abs() ** power).mean(dim=(1, 2, 3)) for a, b in context.pairs()]
    values = scale * torch.cat(parts)
    return rows_of("theirs", {"error": values}, len(values), settings={"power": power})


def psnr(context):
    return {}


def no_rows(context):
    return 3.0


def wrong_value(context):
    return {"theirs/tensor": Row(torch.ones(()), 4)}


def taken_name(context):
    return {"reconstruction/psnr": Row(1.0, 4)}


class Nearest(AbstractProbe):
    target = "attributes"

    def __init__(self, name="background"):
        self.name = name

    def fit(self, codes, target):
        self.seen, self.labels = codes.pooled, [each[self.name] for each in target]
        return self

    def evaluate(self, codes, target):
        best = torch.cdist(codes.pooled.double(), self.seen.double()).argmin(dim=1).tolist()
        hits = [self.labels[i] == each[self.name] for i, each in zip(best, target)]
        return {"accuracy": sum(hits) / len(hits)}


class NoProbe:
    pass
"""
ENTRIES = """[lgvq_plugin.metrics]
their_error = their_metrics:error
[lgvq_plugin.probes]
their_nearest = their_metrics:Nearest
"""


@pytest.fixture(autouse=True)
def module(install, monkeypatch):
    home = install("their_metrics", ENTRIES, MODULE)
    monkeypatch.setenv("PYTHONPATH", str(home))  # of the processes of an ablation
    return home / "their_metrics.py"


def by_hand(host, count, power):
    data = Scenes("validation", size=32, length=count)
    images = torch.stack(
        [torch.from_numpy(data[i]["image"]).permute(2, 0, 1) for i in range(count)]
    )
    images, given = ((x.double() * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1
                     for x in (images, host(images)[0].detach()))  # fmt: skip
    return ((images - given).abs() ** power).mean().item()


@pytest.mark.parametrize(
    ("name", "label"), [("their_metrics:error", "error"), ("their_error", "their_error")]
)
def test_a_metric_is_measured_beside_ours(palette, config, name, label):
    options = {**config["evaluation"], "options": {label: {"power": 2}}}
    result = evaluate(
        palette, config, metrics=[name, "psnr"], limit=6, options=options, progress=False
    )
    row = result["metrics"]["theirs/error"]
    assert row["value"] == pytest.approx(by_hand(palette, 6, 2), rel=1e-5)
    assert row["settings"] == {"power": 2}
    assert "reconstruction/psnr" in result["metrics"]
    assert result["settings"]["metrics"] == ["psnr", label]


def test_the_command_writes_it_like_ours(palette, config, tmp_path, capsys):
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    params = {"lossconfig": loss, "n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1}
    model = {"target": "vqvae", "params": params, "learning_rate": 1e-3}  # a short name
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "model": model}))
    from lgvq_plugin.hosts.vqvae import VQVAE

    torch.save({"state_dict": VQVAE(**params).state_dict()}, tmp_path / "host.ckpt")
    argv = ["eval", "-b", tmp_path / "c.yaml", "--ckpt", tmp_path / "host.ckpt", "--limit", "4"]
    argv += ["--metrics", "psnr,their_metrics:error", "-o", tmp_path / "o", "--no-progress"]
    argv += ["--csv", tmp_path / "r.csv"]
    assert cli.main([*map(str, argv), "evaluation.options.error.scale=3"]) == 0
    assert "theirs/error" in capsys.readouterr().out
    found = json.loads((tmp_path / "o" / "results.json").read_text())["metrics"]["theirs/error"]
    lines = (tmp_path / "r.csv").read_text().splitlines()
    rows = {row["metric"]: row for row in csv.DictReader(lines)}
    assert float(rows["theirs/error"]["value"]) == found["value"]
    plain = evaluate_error(VQVAE(**params).eval(), tmp_path, config)
    assert found["value"] == pytest.approx(3 * plain, rel=1e-5)


def evaluate_error(host, folder, config):
    host.load_state_dict(torch.load(folder / "host.ckpt", weights_only=True)["state_dict"])
    return by_hand(host, 4, 1)


def test_a_changed_file_is_measured_again(palette, config, module, tmp_path):
    def measure():
        found = evaluate(palette, config, metrics=["their_metrics:error"], limit=4,
                         output=tmp_path / "o", progress=False)  # fmt: skip
        return found["metrics"]["theirs/error"]["value"]

    before = measure()
    assert measure() == before
    module.write_text(MODULE.replace("values = scale", "values = 10 * scale"))
    sys.modules.pop("their_metrics")
    assert measure() == pytest.approx(10 * before)


@pytest.mark.parametrize("name", ["their_metrics:Nearest", "their_nearest"])
def test_a_probe_is_fitted_and_has_its_control(palette, config, name):
    label = name.rpartition(":")[2]
    options = {**config["evaluation"], "options": {label: {"name": "background_color"}}}
    found = evaluate(palette, config, metrics=[name], options=options, progress=False)["metrics"]
    high, low = (found[f"{label}/{part}accuracy"] for part in ("", "shuffled/"))
    assert high["value"] > low["value"] + 0.1
    assert (high["n"], low["higher_is_better"]) == (48, None)
    assert high["settings"]["train_images"] == 96


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (["their_eror"], {}, "metrics: no 'their_eror'; did you mean 'their_error'"),
        (["their_nearst"], {}, "did you mean 'their_nearest'"),
        (["psrn"], {}, "did you mean 'psnr'.*or give 'pkg.module:function'"),
        (["their_metrics:eror"], {}, "did you mean 'error'"),
        (["no_such_package:error"], {}, "no module named 'no_such_package'"),
        (["their_metrics:psnr"], {}, "metrics: two are named psnr"),
        (["their_metrics:error", "their_metrics.error"], {}, "two are named error"),
        (["their_metrics:NoProbe"], {}, "expected a function of a context, or a subclass"),
        (["their_metrics:ENTRY"], {}, "has no 'ENTRY'"),
        (["their_metrics:error"], {"error": {"powr": 2}}, "options.error: .*did you mean 'power'"),
        (["their_metrics:error"], {"error": 2}, "options.error: expected a mapping"),
        (["their_metrics:Nearest"], {"Nearest": {"nam": 2}}, "options.Nearest.*mean 'name'"),
        (["their_metrics:no_rows"], {}, "no_rows: expected a mapping of names to rows, got 3.0"),
        (["their_metrics:wrong_value"], {}, "theirs/tensor.value: expected a number, got tensor"),
        (["psnr", "their_metrics:taken_name"], {}, "gives 'reconstruction/psnr' a second time"),
    ],
)
def test_mistakes_are_named(palette, config, metrics, options, message):
    options = {**config["evaluation"], "options": options}
    with pytest.raises(ConfigError, match=message):
        evaluate(palette, config, metrics=metrics, limit=4, options=options, progress=False)


def test_options_of_a_metric_that_is_not_measured_are_reported(palette, config, caplog):
    options = {**config["evaluation"], "options": {"eror": {"power": 2}}}
    metrics = ["their_metrics:error"]
    evaluate(palette, config, metrics=metrics, limit=4, options=options, progress=False)
    assert "evaluation.options.eror is not read" in caplog.text
    assert "did you mean 'error'" in caplog.text


PLAN = """
base: [../base.yaml]
seeds: [0]
variants: {a: {}}
evaluation: {metrics: [psnr, METRIC], options: {error: {POWER: 2}}, limit: 4}
examples: 0
"""


def plan_at(folder, config, **words):
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    params = {"lossconfig": loss, "n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1}
    model = {"target": "vqvae", "params": params, "learning_rate": 1e-3}
    training = {"max_steps": 1, "accelerator": "cpu", "val_every": None, "images_every": None}
    base = {**config, "model": model, "training": training}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "plans").mkdir(exist_ok=True)
    text = PLAN.replace("METRIC", words.get("metric", "their_metrics:error"))
    (folder / "plans" / "plan.yaml").write_text(text.replace("POWER", words.get("power", "power")))
    return folder / "plans" / "plan.yaml"


def test_a_plan_names_mistakes_before_it_trains(config, tmp_path):
    assert read_plan(plan_at(tmp_path, config)).jobs[0].evaluation["metrics"][1].endswith("error")
    with pytest.raises(ConfigError, match=r"plan.yaml: metrics: no 'psrn'; did you mean 'psnr'"):
        read_plan(plan_at(tmp_path, config, metric="psrn"))
    with pytest.raises(ConfigError, match=r"plan.yaml: evaluation.options.error: .*mean 'power'"):
        read_plan(plan_at(tmp_path, config, power="powr"))


@pytest.mark.slow
@pytest.mark.extended
def test_it_is_in_the_report_of_an_ablation(config, tmp_path):
    argv = ["ablate", "-b", plan_at(tmp_path, config), "-o", tmp_path / "out"]
    assert cli.main([*map(str, argv)]) == 0
    assert "theirs/error" in (tmp_path / "out" / "values.csv").read_text()
    assert "theirs/error" in (tmp_path / "out" / "report.html").read_text()


def test_the_block_checks_its_options():
    with pytest.raises(ConfigError, match=r"evaluation.options.error: expected a mapping"):
        EvaluationConfig.from_dict({"options": {"error": 3}})
