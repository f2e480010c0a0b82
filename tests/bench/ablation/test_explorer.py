"""The codebook explorer on a host whose codes are known: one code for each shade of gray."""

import pytest
import torch
from torch import nn

from lgvq_plugin.bench.ablate import inspect as main
from lgvq_plugin.bench.explorer import Samples, write_explorer
from lgvq_plugin.sockets import ConfigError

SHADES = torch.linspace(-1, 1, 5)


class Quantize(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(rows)

    def forward(self, z):
        distance = (z.movedim(1, -1)[..., None, :] - self.embedding.weight).square().sum(-1)
        indices = distance.argmin(-1)
        z_q = self.embedding(indices).movedim(-1, 1)
        return z_q, torch.zeros(()), (None, None, indices.flatten())


class Gray(nn.Module):
    """A code is the shade of a patch; the last code is never chosen."""

    def __init__(self, shift=0.0):
        super().__init__()
        shades = torch.cat([SHADES + shift, torch.tensor([9.0])])
        self.quantize = Quantize(torch.stack([shades, shades.square()], dim=1))

    def encode(self, images):
        mean = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        return self.quantize(torch.cat([mean, mean.square()], dim=1))

    def decode(self, codes):
        image = codes[:, :1].expand(-1, 3, -1, -1)
        return image.repeat_interleave(4, 2).repeat_interleave(4, 3)

    def forward(self, images):
        return self.decode(self.encode(images)[0]), torch.zeros(())


NAMES = ["black", "dark", "gray", "light", "white"]


class Guide:
    config = {"use": "none"}

    def encode(self, captions):
        sentence = torch.tensor([[1.0, float(SHADES[NAMES.index(c)])] for c in captions])
        return type("Features", (), {"sentence": sentence})


@pytest.fixture(scope="module")
def samples():
    """Fifty images of four patches in two shades, whose captions name the shades."""
    generator = torch.Generator().manual_seed(0)
    images, captions = [], []
    for _ in range(50):
        shades = torch.randint(5, (2,), generator=generator)
        cells = SHADES[shades][[0, 1, 1, 0]].reshape(1, 2, 2).expand(3, 2, 2)
        images.append(cells.repeat_interleave(4, 1).repeat_interleave(4, 2))
        captions.append([f"a {NAMES[shades[0]]} and a {NAMES[shades[1]]} <square>"])
    return Samples(torch.stack(images), captions, {"target": "here"})


@pytest.fixture(scope="module")
def page(samples, tmp_path_factory):
    hosts = {"baseline": Gray(), "ours": Gray(0.01)}
    folder = tmp_path_factory.mktemp("explorer")
    return write_explorer(hosts, samples, folder, guide=Guide(), shown=20, progress=False)


def test_it_is_one_file_with_both_checkpoints(page):
    html = page.read_text()
    assert html.count("5 of 6 codes used") == 2
    assert "1 dead" in html
    assert "50 captioned images; the page shows the first 20" in html
    assert "src=" not in html.split("<script")[0]


@pytest.mark.slow
def test_it_renders_without_errors(page, browser):
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.errors() == []
        assert len(browser.shown("main > section")) == 6
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert len(browser.all("#galleries .code")) == 2 * 5
        assert len(browser.all("#heat svg")) == 3


@pytest.mark.slow
def test_a_word_finds_its_code_and_where_it_fires(page, browser, samples):
    browser.open(page)
    browser.type("#word", "gray")
    found = [
        e.get_attribute("data-code") for e in browser.all('#word-result [data-panel="0"] .code')
    ]
    assert found == ["2"]
    first = next(i for i, (caption,) in enumerate(samples.captions[:20]) if "gray" in caption)
    figures = browser.all('#word-result [data-panel="0"] .shot')
    assert len(figures) == min(12, sum("gray" in c for (c,) in samples.captions[:20]))
    assert samples.captions[first][0] in [figure.get_attribute("title") for figure in figures]
    # What is dark are the places with another shade: two of four, or none in an all-gray image.
    dark = [
        path.get_attribute("d").count("z")
        for path in browser.all('#word-result [data-panel="0"] .shot path')
    ]
    assert set(dark) <= {0, 2}
    browser.type("#word", "nothing")
    assert browser.shown("#no-word")
    assert browser.errors() == []


@pytest.mark.slow
def test_a_code_shows_its_words_and_its_patch(page, browser):
    browser.open(page)
    browser.run('document.querySelector(\'#galleries [data-panel="1"] [data-code="4"]\').click()')
    assert "ours, code 4" in browser.one("#detail h3").text
    assert [e.get_attribute("data-word") for e in browser.all("#detail .chip")] == ["white"]
    pixel = """
        const tile = document.querySelector('#detail .tile'), style = getComputedStyle(tile);
        const image = new Image(); image.src = style.backgroundImage.slice(5, -2);
        const done = arguments[arguments.length - 1];
        image.decode().then(() => {
          const canvas = document.createElement('canvas');
          [canvas.width, canvas.height] = [image.width, image.height];
          const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
          done([...context.getImageData(4 * 4 + 1, 1, 1, 1).data].slice(0, 3));
        });"""
    assert browser.driver.execute_async_script(pixel) == [255, 255, 255]


def test_galleries_filter_by_word_and_show_the_dead(page, browser):
    browser.open(page)
    browser.type("#code-word", "black")
    assert [e.get_attribute("data-code") for e in browser.all("#galleries .code")] == ["0", "0"]
    browser.type("#code-word", "")
    browser.one("#show-dead").click()
    assert len(browser.all("#galleries .code")) == 2 * 6
    assert "5" in browser.one(".dead").get_attribute("textContent")
    assert browser.errors() == []


@pytest.mark.slow
def test_the_filter_takes_whole_words(page, browser):
    browser.open(page)
    for typed, codes in (("ack", []), ("blac", []), ("blac*", ["0", "0"]), ("BLACK", ["0", "0"])):
        browser.type("#code-word", typed)
        shown = [e.get_attribute("data-code") for e in browser.all("#galleries .code")]
        assert shown == codes, typed
    browser.type("#word", "ack")
    assert browser.all("#chips .chip") == []
    browser.type("#word", "bl")
    assert [e.get_attribute("data-word") for e in browser.all("#chips .chip")] == ["black"]
    assert browser.errors() == []


def test_names_captions_and_settings_are_not_markup(samples, tmp_path, browser):
    hostile = "<img src=x onerror=\"document.title='taken'\"></script><script>alert(1)</script>"
    captions = [[f"{text} {hostile}"] for (text,) in samples.captions]
    hostile_samples = Samples(samples.images, captions, {"target": hostile, hostile: 1})
    page = write_explorer({hostile: Gray(), "b": Gray()}, hostile_samples, tmp_path, progress=False)
    assert page.read_text().count("<script") == 2
    browser.open(page)
    assert browser.driver.title == f"Codebook of {hostile} and b"
    assert browser.errors() == []
    assert browser.all("img[src=x]") == []


def test_no_guide_no_map(samples, tmp_path, browser):
    page = write_explorer({"one": Gray()}, samples, tmp_path, progress=False)
    browser.open(page)
    assert "No map" in browser.one("#maps").text
    assert browser.errors() == []


def test_images_without_captions_show_codes_without_words(samples, tmp_path, browser):
    mute = Samples(samples.images, [[""]] * len(samples.images), samples.source)
    browser.open(write_explorer({"one": Gray()}, mute, tmp_path, guide=Guide(), progress=False))
    assert browser.errors() == []
    assert len(browser.all("#galleries .code")) == 5
    assert "0 with a word" in browser.one("#overview").text
    assert "No map" in browser.one("#maps").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "a", "--ckpt", "b", "--ckpt", "c"], "one or two"),
        (["--ckpt", "a", "--limit", "0"], "--limit"),
        (["--ckpt", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_wrong_input_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main([*arguments, "-o", str(tmp_path)])
