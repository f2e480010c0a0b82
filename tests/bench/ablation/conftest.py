"""Invented results of an ablation, and a real browser to look at pages with."""

import shutil

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.page import png_bytes
from lgvq_plugin.bench.records import Results, Run

GAINS = {"baseline": 0.0, "paper": 0.05, "all": 0.4}  # added to every image's PSNR
IMAGES = 40


def invented_run(root, variant, seed):
    generator = np.random.default_rng(seed)
    psnr = generator.normal(20, 2, IMAGES) + GAINS[variant]
    psnr = psnr + (
        np.random.default_rng([7, seed]).normal(0, 1, IMAGES) if variant == "paper" else 0
    )
    fid = 30 - 10 * GAINS[variant] * (1 + 0.01 * seed) + 0.1 * seed
    metrics = {
        "reconstruction/psnr": {
            "value": psnr.mean(),
            "n": IMAGES,
            "unit": "dB",
            "higher_is_better": True,
            "per_image": psnr.tolist(),
        },
        "reconstruction/fid": {"value": fid, "n": IMAGES, "unit": "", "higher_is_better": False},
        "codebook/usage": {"value": 0.5, "n": IMAGES, "unit": "", "higher_is_better": True},
        "codebook/entropy": {
            "value": 5 + seed,
            "n": IMAGES,
            "unit": "bit",
            "higher_is_better": None,
        },
    }
    examples = []
    for i in range(3):
        paths = {}
        for kind in ("original", "reconstruction"):
            path = root / variant / f"{kind}_{i}.png"
            image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_bytes(image))
            paths[kind] = str(path.relative_to(root))
        examples.append({"caption": f"scene <{i}>", **paths})
    steps = range(0, 101, 20)
    return Run(
        data="",
        variant=variant,
        seed=seed,
        evaluation={
            "settings": {"limit": IMAGES},
            "environment": {"torch": "2"},
            "metrics": metrics,
        },
        curves={
            "train/rec_loss": [[s, 1 / (s + 10) + 0.001 * seed] for s in steps],
            "val/rec_loss": [[s, 1.2 / (s + 10) - 0.01 * GAINS[variant]] for s in steps],
        },
        cost={
            "seconds_per_step": 0.1 + GAINS[variant] / 10,
            "peak_memory_mib": 900.0,
            "steps": 100,
        },
        examples=examples,
    )


@pytest.fixture
def results(invented, tmp_path):
    """Invented results, whose examples are in `tmp_path`."""
    found, folder = invented
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return found


@pytest.fixture(scope="session")
def invented(tmp_path_factory):
    """Three variants, two of them better at something, and one that failed; and their folder."""
    folder = tmp_path_factory.mktemp("ablation")
    runs = [invented_run(folder, variant, seed) for variant in GAINS for seed in range(3)]
    failed = Run(data="", variant="broken", seed=0, status="failed", reason="boom <b>bold</b>")
    results = Results(
        title="Invented & tested",
        references=("baseline", "paper"),
        variants={
            "baseline": {"note": "the host alone", "changes": {}},
            "paper": {"note": "as released", "changes": {"recipe": "paper"}},
            "all": {"note": "", "changes": {"objectives": ["masked_text"]}, "config": {"a": 1}},
            "broken": {"note": "", "changes": {"model.params.n_embed": 0}},
        },
        runs=(*runs, failed),
    )
    return results, folder


class Browser:
    """A headless Chromium; `open` also waits until the page is drawn and forgets old errors."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, dark=False):
        scheme = "dark" if dark else "light"
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": name, "value": value} for name, value in features.items()]},
        )
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.resolve().as_uri())
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def shown(self, selector):
        return [element for element in self.all(selector) if element.is_displayed()]

    def type(self, selector, text):
        element = self.one(selector)
        element.clear()
        element.send_keys(text or " \b")  # so that the page hears of an emptied field too

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One Chromium for all tests, or a skip that says what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install [test]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "no-first-run", "disable-dev-shm-usage"),
        *("window-size=1280,900", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"),
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=driver)
    session = webdriver.Chrome(options=options, service=service)
    yield Browser(session)
    session.quit()
