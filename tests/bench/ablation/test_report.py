"""The report says what the numbers say, and is a good page in a real browser."""

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lgvq_plugin.bench import figures
from lgvq_plugin.bench.ablate import main as ablate_main
from lgvq_plugin.bench.ablate import publish
from lgvq_plugin.bench.figures import write_figures as draw
from lgvq_plugin.bench.page import finite, number
from lgvq_plugin.bench.records import Results
from lgvq_plugin.bench.report import markdown, write_report
from lgvq_plugin.bench.statistics import compare
from lgvq_plugin.cli import main as cli
from lgvq_plugin.sockets import ConfigError


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes seconds; see test_figures.py."""
    monkeypatch.setattr(figures, "write_figures", lambda *args: [])


@pytest.fixture(scope="module")
def page(invented, tmp_path_factory):
    results, examples = invented
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(examples, folder, dirs_exist_ok=True)
    return publish(results, folder)


class Text(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.words, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.slow
def test_nothing_is_outside_the_file(page):
    links = Text(page.read_text()).links
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in page.read_text()
    assert "@import" not in page.read_text()


@pytest.mark.slow
def test_the_summary_is_made_of_the_numbers(page):
    text = re.sub(r"\s+", " ", "".join(Text(page.read_text()).words))
    # psnr is 0.4 dB up on every image of all; fid 4.00, 4.04, 4.08 down.
    assert "all vs. baseline: better on 2 metrics" in text
    assert "reconstruction/psnr +0.4000 dB [+0.4000, +0.4000]" in text
    assert "reconstruction/fid −4.040 dB" not in text
    assert "reconstruction/fid −4.040 [−4.1" in text
    assert "Failed: broken (1 run)." in text
    assert (
        "4 of 9 comparisons are significant at a false discovery rate of 5 % (Benjamini–Hochberg). "
        "Uncorrected, 4 of the 95 % intervals exclude zero; if nothing differed, about 0.45 would "
        "by chance."
    ) in text
    assert "Step time relative to baseline: paper 1.05 ×, all 1.40 ×." in text


def test_captions_count_seeds_and_images(page):
    captions = re.findall(r"<caption>(.*?)</caption>", page.read_text())
    assert "over 3 seeds, on 40 images" in captions[0]
    assert "over 3 seeds and 40 images" in captions[1]
    for caption in captions[:2]:
        assert "at a false discovery rate of 5 % over the 9 comparisons of this report" in caption


def test_an_interval_that_the_correction_overrules_has_a_mark_of_its_own(results, tmp_path):
    def extended(run):
        """`paper` gains 0.98 to 1.64 of accuracy; eight metrics that do not differ are added."""
        if run.status != "done":
            return run
        gain = {"baseline": 0.0, "paper": 1.0, "all": 0.0}[run.variant] * (1 + 0.3 * run.seed)
        values = {"vqa/accuracy": gain + (0.5 * run.seed - 0.4 if run.variant == "all" else 0)}
        values |= {f"noise/{i}": (run.seed + i) % 3 for i in range(8) if run.variant != "all"}
        if run.variant == "paper":
            values |= {name: value * -1 + 1 for name, value in values.items() if "noise" in name}
        rows = {name: {"value": v, "higher_is_better": True} for name, v in values.items()}
        return replace(run, evaluation={"metrics": {**run.metrics, **rows}})

    many = replace(results, runs=tuple(map(extended, results.runs)))
    page = publish(many, tmp_path)
    cells = [c for c in compare(many) if (c.variant, c.metric) == ("paper", "vqa/accuracy")]
    (found,) = cells[0].differences
    assert 0 < found.low < found.value
    assert found.p < 0.05 < found.p_adjusted
    assert found.verdict == ""
    lines = page.with_suffix(".md").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("| vqa/accuracy")]
    assert " △ |" in line
    assert "▲" not in line
    html = page.read_text()
    assert "△ interval alone excludes zero" in html
    assert "(the interval alone excludes zero on 1)" in "".join(Text(html).words)
    with (tmp_path / "differences.csv").open() as file:
        rows = {(r["variant"], r["reference"], r["metric"]): r for r in csv.DictReader(file)}
    row = rows["paper", "baseline", "vqa/accuracy"]
    assert (float(row["p"]), float(row["p_adjusted"])) == (found.p, found.p_adjusted)
    assert row["verdict"] == ""


def test_text_from_outside_is_not_markup(page):
    html = page.read_text()
    assert "boom &lt;b&gt;bold&lt;/b&gt;" in html
    assert "scene &lt;0&gt;" in html


HOSTILE = (
    "<script>document.title='taken'</script>\"'><img src=x onerror=\"document.title='taken'\">"
)


def hostile(results):
    """Every string that a page shows, and the seed, is markup with a script."""
    runs = tuple(
        replace(
            run,
            data=HOSTILE,
            variant=run.variant + HOSTILE,
            seed=f"{run.seed}{HOSTILE}",
            status=run.status if run.status != "failed" else f"failed{HOSTILE}",
            reason=HOSTILE,
            curves={name + HOSTILE: curve for name, curve in run.curves.items()},
            cost={**run.cost, "device": HOSTILE},
            examples=[{**example, "caption": f"$\\x$ {HOSTILE}"} for example in run.examples],
            evaluation={
                "metrics": {
                    name + HOSTILE: {**row, "unit": HOSTILE} for name, row in run.metrics.items()
                },
                "settings": {HOSTILE: HOSTILE},
                "skipped": {HOSTILE: HOSTILE},
            },
        )
        for run in results.runs
    )
    variants = {
        name + HOSTILE: {"note": HOSTILE, "changes": {HOSTILE: HOSTILE}, "config": HOSTILE}
        for name in results.variants
    }
    references = tuple(name + HOSTILE for name in results.references)
    return replace(results, title=HOSTILE, runs=runs, variants=variants, references=references)


@pytest.mark.slow
def test_no_value_becomes_markup(results, tmp_path):
    page = publish(hostile(results), tmp_path)
    assert draw(hostile(results), compare(hostile(results)), tmp_path)
    html = page.read_text()
    assert "<img src=x" not in html
    assert html.count("<script") == 2  # the data, and our own
    assert "<script" not in page.with_suffix(".md").read_text()


def test_no_script_but_our_own_runs(results, tmp_path, browser):
    page = publish(hostile(results), tmp_path)
    browser.open(page)
    assert browser.driver.title == HOSTILE
    assert browser.errors() == []
    assert len(browser.all("#curve path")) >= 3
    # Were a value to escape, the policy would still refuse it.
    page.write_text(page.read_text().replace("<main>", f"<main>{HOSTILE}<script>1</script>", 1))
    browser.open(page)
    assert browser.driver.title == HOSTILE
    assert any("Content Security Policy" in error for error in browser.errors())


def changed(results, tmp_path, path, value):
    """Put `value` at `path` of results.json."""
    publish(results, tmp_path)
    file = tmp_path / "results.json"
    whole = json.loads(file.read_text())
    *where, last = path
    node = whole
    for key in where:
        node = node[key]
    node[last] = value
    file.write_text(json.dumps(whole))
    return file


PSNR = ("runs", 0, "evaluation", "metrics", "reconstruction/psnr")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("runs", 4, "seed"), HOSTILE, r"runs\[4\]\.seed: expected a whole number"),
        (("title",), ["x"], "title: expected a string"),
        (("title",), "\ud800", "title: expected a string"),
        (("references",), [], "references: expected one of baseline"),
        (("references", 0), "nobody", r"references\[0\]: expected one of baseline"),
        (("variants", "paper"), "x", r"variants\.paper: expected a mapping"),
        (("variants", "paper", "note"), 3, r"variants\.paper\.note: expected a string"),
        (("runs",), {"a": 1}, "runs: expected a list"),
        (("runs", 1, "variant"), "nobody", r"runs\[1\]\.variant: expected one of baseline"),
        (("runs", 1, "seed"), 0, r"runs\[1\]: expected one run per"),
        ((*PSNR, "value"), "20", r"reconstruction/psnr\.value: expected a number, got '20'"),
        ((*PSNR, "value"), True, r"reconstruction/psnr\.value: expected a number"),
        ((*PSNR, "value"), 10**400, r"reconstruction/psnr\.value: expected a number"),
        ((*PSNR, "per_image"), [1, None], r"psnr\.per_image\[1\]: expected a number"),
        ((*PSNR, "higher_is_better"), "yes", "higher_is_better: expected true or false"),
        (PSNR, {}, "reconstruction/psnr: expected a mapping with 'value'"),
        (("runs", 0, "cost"), {"seconds_per_step": "1"}, "seconds_per_step: expected a number"),
        (("runs", 0, "examples", 0), {}, r"examples\[0\]: expected a mapping with 'original'"),
        (("runs", 0, "examples", 0, "original"), "/etc/hosts", "expected a path below"),
        (("runs", 0, "examples", 0, "original"), "results.json", "cannot be read as a PNG"),
        (("runs", 0, "examples", 0, "original"), "gone.png", "cannot be read as a PNG"),
    ],
)
def test_a_changed_results_file_is_refused_by_its_key(
    results, tmp_path, capsys, path, value, message
):
    file = changed(results, tmp_path, path, value)
    assert cli(["ablate", "-b", "plan.yaml", "-o", str(tmp_path), "--report"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert str(file) in said or "examples" in message or str(value) in said
    assert "Traceback" not in said


def test_downloads_hold_the_numbers(page, results):
    html = page.read_text()
    files = dict(re.findall(r'download="([^"]+)" href="data:[^,]+;base64,([^"]+)"', html))
    texts = {name: base64.b64decode(content).decode() for name, content in files.items()}
    rows = list(csv.DictReader(io.StringIO(texts["values.csv"])))
    run = results.runs[4]
    (row,) = [
        row
        for row in rows
        if (row["variant"], row["seed"], row["metric"])
        == (run.variant, str(run.seed), "reconstruction/psnr")
    ]
    assert float(row["value"]) == run.metrics["reconstruction/psnr"]["value"]
    loaded = json.loads(texts["results.json"])["results"]
    assert len(loaded["runs"]) == len(results.runs)
    verdicts = {
        (r["variant"], r["reference"], r["metric"]): r["verdict"]
        for r in csv.DictReader(io.StringIO(texts["differences.csv"]))
    }
    assert verdicts["all", "baseline", "reconstruction/fid"] == "better"
    assert verdicts["all", "paper", "reconstruction/fid"] == "better"
    assert verdicts["all", "baseline", "codebook/usage"] == ""


def test_tables_are_written_beside_the_page(page, results):
    """The CSV files have every run's metrics and costs, and the interval of every difference."""
    with (page.parent / "values.csv").open() as file:
        values = {(r["variant"], r["seed"], r["metric"]): r for r in csv.DictReader(file)}
    for run in results.runs:
        for metric, entry in run.metrics.items():
            row = values[run.variant, str(run.seed), metric]
            assert (float(row["value"]), row["unit"]) == (entry["value"], entry["unit"])
    assert float(values["all", "2", "cost/seconds_per_step"]["value"]) == pytest.approx(0.14)
    assert values["all", "2", "cost/peak_memory_mib"]["unit"] == "MiB"
    assert not any(variant == "broken" for variant, _, _ in values)
    with (page.parent / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(cell, d) for cell in compare(results) for d in cell.differences]
    assert len(rows) == len(expected)
    for row, (cell, d) in zip(rows, expected, strict=True):
        assert (row["variant"], row["metric"]) == (cell.variant, cell.metric)
        assert row["low"] == ("" if d.low is None else str(d.low))
        assert row["verdict"] == d.verdict
        assert row["p"] == ("" if d.p is None else str(d.p))


def test_the_summary_file_has_every_number_but_those_by_image(page, results):
    text = (page.parent / "summary.json").read_text()
    small, whole = json.loads(text), json.loads((page.parent / "results.json").read_text())
    assert "per_image" not in text
    assert "curves" not in text
    for one, run in zip(small["runs"], whole["runs"], strict=True):
        assert (one["variant"], one["seed"], one["status"]) == (
            *(run["variant"], run["seed"], run["status"]),
        )
        for name, row in one["metrics"].items():
            assert row["value"] == run["evaluation"]["metrics"][name]["value"]
    psnr = [d for d in small["differences"] if d["metric"] == "reconstruction/psnr"]
    found = next(d for d in psnr if (d["variant"], d["reference"]) == ("all", "baseline"))
    assert found["value"] == pytest.approx(0.4)  # conftest lifts every image by 0.4 dB


def test_the_markdown_table_has_the_same_marks(page):
    text = page.with_suffix(".md").read_text()
    assert "| | baseline | paper | all | broken |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| reconstruction/fid")]
    assert re.fullmatch(r"\| reconstruction/fid ↓ \| 30.10 ± 0.10 \|.* ▲ \|.* ▲ \| – \|", line)
    assert "over 3 seeds, on 40 images" in text
    before, after = text.split("Controls (neither")
    assert "codebook/entropy" in after
    assert "codebook/entropy" not in before
    assert "<" not in text.replace("scene <", "")


def test_the_command_writes_the_report_again(page, capsys):
    page.unlink()
    arguments = ["-b", "plan.yaml", "-o", str(page.parent), "--report"]
    assert ablate_main(arguments) == 1  # one run failed
    assert page.exists()
    assert "all vs. baseline: better on 2 metrics" in capsys.readouterr().out


def test_results_come_back_from_their_file(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path)
    assert compare(Results.load(path)) == compare(results)


def test_no_run_at_all_is_still_a_page(results, tmp_path):
    runs = tuple(replace(run, status="failed", reason="x", evaluation={}) for run in results.runs)
    bare = tuple(replace(run, curves={}, examples=[], cost={}) for run in runs)
    html = publish(replace(results, runs=bare), tmp_path).read_text()
    assert "No run is done" in html
    assert "0 of 10 runs done" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234567.0, "1.23e+06"),
        (0.00001234, "1.23e−05"),
        (256, "256"),
        (0.00321, "0.003210"),
    ],
)
def test_numbers_to_read(value, text):
    assert number(value) == text


def test_json_for_scripts_has_no_nan():
    assert finite({"a": [float("inf")]}) == {"a": [None]}
    assert finite((1.0, float("nan"))) == [1.0, None]


# -- in Chromium ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_without_errors(page, browser, dark, width):
    browser.open(page, width=width, dark=dark)
    assert browser.errors() == []
    assert len(browser.shown("main > section")) == 9
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert len(browser.all("#curve path")) == 3 * 3 + 3  # each seed, and the means
    assert all(browser.run("return [...document.images].map((i) => i.naturalWidth)"))
    red, green, blue = browser.run(
        "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    )[:3]
    assert (red + green + blue < 200) == dark


def test_the_button_turns_the_theme(page, browser):
    browser.open(page)
    color = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(color)
    browser.one("#theme").click()
    assert browser.run(color) != before
    browser.run("localStorage.clear()")


def test_a_click_on_a_head_sorts(page, browser):
    browser.open(page)
    names = (
        "return [...document.querySelectorAll('#numbers tbody tr')].map((r) => r.dataset.variant)"
    )
    head = browser.one('#numbers thead [data-metric="reconstruction/fid"]')
    head.click()
    assert browser.run(names) == ["all", "paper", "baseline", "broken"]  # 26, 29.5, 30, none
    head.click()
    assert browser.run(names) == ["baseline", "paper", "all", "broken"]
    assert head.get_attribute("aria-sort") == "descending"


@pytest.mark.slow
def test_filters_of_the_table(page, browser):
    browser.open(page)
    browser.type("#find-variant", "al")
    assert [row.get_attribute("data-variant") for row in browser.shown("#numbers tbody tr")] == [
        "all"
    ]
    browser.type("#find-variant", "nobody")
    assert browser.shown('[data-empty="numbers"]')
    browser.type("#find-variant", "")
    browser.type("#find-metric", "psnr")
    assert len(browser.shown("#numbers thead [data-metric]")) == 1
    browser.type("#find-metric", "")
    browser.one("#only-marked").click()
    shown = [e.get_attribute("data-metric") for e in browser.shown("#numbers thead [data-metric]")]
    assert shown == ["reconstruction/psnr", "reconstruction/fid"]
    assert browser.errors() == []


def test_long_names_fit_a_phone(results, tmp_path, browser):
    name = "masked_text+global_semantic+relationship"
    runs = tuple(replace(r, variant=name) if r.variant == "all" else r for r in results.runs)
    shown = {name if v == "all" else v: about for v, about in results.variants.items()}
    page = publish(replace(results, runs=runs, variants=shown), tmp_path)
    browser.open(page, width=390)
    assert browser.run("return document.documentElement.scrollWidth") <= 390


def test_one_seed_is_mentioned_first(results, tmp_path):
    page = publish(replace(results, runs=tuple(r for r in results.runs if r.seed == 0)), tmp_path)
    bullets = re.findall(r"<li>(.*?)</li>", page.read_text())
    assert bullets[0].startswith("<b>One seed</b>")
    assert "no interval for 2" in bullets[1]  # fid and usage have no values by image


@pytest.mark.slow
def test_controls_are_shown_when_asked_for(page, browser):
    browser.open(page)
    entropy = '#numbers thead [data-metric="codebook/entropy"]'
    assert not browser.shown(entropy)
    assert not browser.shown("#pairs tr[data-neutral]")
    browser.one("#controls").click()
    browser.one("#pair-controls").click()
    assert browser.shown(entropy)
    assert len(browser.shown("#pairs tr[data-neutral]")) == 3


@pytest.mark.slow
def test_filters_of_the_differences(page, browser):
    browser.open(page)
    browser.one("#only-clear").click()
    rows = browser.shown("#pairs tbody tr")
    assert {row.get_attribute("data-verdict") for row in rows} <= {"better", "worse"}
    browser.type("#find-difference", "psnr")
    assert len(browser.shown("#pairs tbody tr")) < len(rows)


@pytest.mark.slow
def test_an_image_zooms_and_the_arrows_move_on(page, browser):
    browser.open(page)
    browser.one('.grid button[data-column="1"]').click()
    assert [e.text for e in browser.shown("#zoom figcaption")] == [
        *("original", "baseline", "paper", "all"),
    ]
    assert "scene <1>" in browser.one("#zoom .note").text
    browser.one("#zoom button").send_keys("\ue014")  # right arrow
    assert "3 of 3" in browser.one("#zoom .note").text


def test_curves_follow_the_controls(page, browser):
    browser.open(page)
    browser.one("#curve-seeds").click()
    assert len(browser.all("#curve path")) == 3
    browser.all("#curve-legend button")[0].click()
    assert len(browser.all("#curve path")) == 2
    browser.run(
        "const s = document.querySelector('#curve-key'); s.value = 'train/rec_loss';"
        "s.dispatchEvent(new Event('input'))"
    )
    assert "train/rec_loss: mean of 3 seeds" in browser.one("#curve-note").text
    assert browser.errors() == []


@pytest.mark.slow
def test_two_data_sets_are_kept_apart(results, tmp_path, browser):
    other = tuple(replace(run, data="emoji") for run in results.runs)
    first = tuple(replace(run, data="scenes") for run in results.runs)
    page = publish(replace(results, runs=(*first, *other[:3])), tmp_path)
    browser.open(page)
    assert "4 variants × 3 seeds × 2 data sets; 12 of 13 runs done" in browser.one("header").text
    assert "all on scenes vs. baseline" in browser.one("#summary").text
    assert "all on emoji" not in browser.one("#summary").text  # nothing there
    assert len(browser.shown("#numbers tbody tr")) == 8
    browser.run(
        "const s = document.querySelector('#curve-data'); s.value = 'emoji';"
        "s.dispatchEvent(new Event('input'))"
    )
    assert len(browser.all("#curve path")) == 3 + 1
    assert len(browser.all("#images .grid")) == 2
    assert browser.errors() == []


# -- Tampered files, read as the command reads them -----------------------------------------------

SCRIPT = '<script>window.hacked = 1</script>"\'><img src=x onerror="window.hacked = 1">'


def tampered(node, path=()):
    """Yield the path of every value and of every key of a JSON tree, at most two of a list."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node[:2])
    for key, value in pairs:
        yield (*path, key), value
        if isinstance(value, dict | list):
            yield from tampered(value, (*path, key))


def put(tree, path, value, *, is_key=False):
    for key in path[:-1]:
        tree = tree[key]
    if is_key:
        tree[value] = tree.pop(path[-1])
    else:
        tree[path[-1]] = value


@pytest.fixture
def whole(results, tmp_path):
    """A results.json, and a function that reads a changed one as `lgvq ablate --report` does."""
    publish(results, tmp_path)
    file = tmp_path / "results.json"

    def read(tree):
        file.write_text(json.dumps(tree))
        return Results.load(file)

    return json.loads(file.read_text()), read


@pytest.mark.slow
@pytest.mark.extended
def test_a_script_anywhere_in_results_json_is_refused_or_shown(whole, tmp_path, browser):
    tree, read = whole
    tree["runs"] = tree["runs"][:1] + tree["runs"][3:4] + tree["runs"][-1:]
    del tree["variants"]["all"]
    shown, place = [], tmp_path / "report.html"
    for path, value in tampered(tree):
        for is_key in (False, True)[: 1 + isinstance(path[-1], str)]:
            changed = json.loads(json.dumps(tree))
            put(changed, path, SCRIPT, is_key=is_key)
            try:
                results = read(changed)
                html = write_report(results, compare(results), place, root=tmp_path).read_text()
            except ConfigError:
                continue
            assert html.count("<script") == 2, path
            assert "<img src=x" not in html, path
            assert "<script" not in markdown(results, compare(results)), path
            shown += [path] if isinstance(value, str) and not is_key else []
    assert ("runs", 0, "seed") not in shown
    # All that a page may show, at once, in a real browser.
    names = {"references", "variant", "status", "original", "reconstruction"}
    for path in shown:
        if not names & {*path}:
            put(tree, path, SCRIPT)
    read(tree)
    assert cli(["ablate", "-b", "plan.yaml", "-o", str(tmp_path), "--report"]) == 1  # a failed run
    browser.open(place)
    assert browser.run("return window.hacked") is None
    assert browser.driver.title == SCRIPT
    assert browser.errors() == []
    browser.one("#numbers thead th").click()  # our own scripts run
    assert browser.one("#numbers thead th").get_attribute("aria-sort") == "ascending"
    browser.type("#find-variant", "paper")
    rows = browser.shown("#numbers tbody tr")
    assert {row.get_attribute("data-variant") for row in rows} == {"paper"}


@pytest.mark.slow
def test_the_policy_stops_what_templates_would_let_through(page, tmp_path, browser):
    """Were a value not escaped: inline scripts, handlers, links and requests are refused."""
    attack = (
        f"{SCRIPT}<a id=link href='javascript:window.hacked=1'>x</a>"
        "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>"
        "<base href='https://attacker.invalid/'><script src='https://attacker.invalid/x'></script>"
        "<form id=form action='https://attacker.invalid/'></form>"
        "<object data='data:text/html,<script>parent.hacked=1</script>'></object>"
    )
    copy = tmp_path / "report.html"
    copy.write_text(page.read_text().replace("<main>", f"<main>{attack}", 1))
    browser.open(copy)
    browser.run("document.querySelector('#link').click(); document.querySelector('#form').submit()")
    assert browser.run("return window.hacked") is None
    assert browser.driver.current_url == copy.resolve().as_uri()
    errors = browser.errors()  # a request that was sent would be a network error
    assert all("Content Security Policy" in error for error in errors), errors
    for name in ("script-src", "img-src", "base-uri", "form-action"):
        assert any(name in error for error in errors), name
