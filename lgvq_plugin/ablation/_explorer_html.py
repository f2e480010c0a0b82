"""The frame of the codebook explorer; explorer.js fills it."""

from collections.abc import Mapping
from typing import Any

import yaml

from ._page import counted, escape, finite, number, page

_CODES = (
    '<div class="controls"><label>Order <select id="order"><option value="count">most used first'
    '</option><option value="rare">least used first</option><option value="word">surest word first'
    '</option><option value="index">index</option></select></label>'
    '<label>Word <input type="search" id="code-word" placeholder="any"></label>'
    '<label class="inline"><input type="checkbox" id="show-dead"> dead codes too</label></div>'
    '<div class="panels" id="galleries"></div>'
    '<p class="note">A tile is the mean of all image patches where the code fires. Click one.</p>'
    '<div id="detail" aria-live="polite"></div>'
)
_WORDS = (
    '<div class="controls"><label>Search a word <input type="search" id="word" list="word-list" '
    'placeholder="a word of the captions" autocomplete="off"></label>'
    '<datalist id="word-list"></datalist></div><div class="chips" id="chips"></div>'
    '<div id="word-result" aria-live="polite"></div>'
    '<p class="note hidden" id="no-word">No caption word is spelled so, or it stands at fewer than '
    "three images or at nearly all.</p>"
)
_USAGE = (
    '<div class="panels" id="histograms"></div><p class="note">Codes by rank: how often each was '
    "chosen, on a logarithmic scale. A flat line is an evenly used codebook; where it ends the "
    "dead codes begin.</p>"
)


def explorer_page(data: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: panels, words, images and maps, as explorer.py makes them.
        source: the data section that the images came from.
    """
    panels = data["panels"]
    names = " and ".join(panel["name"] for panel in panels)
    sections = [
        ("overview", "Overview", _overview(data)),
        ("codes", "Codes", _CODES),
        ("words", "Words", _WORDS),
        ("maps", "Similarity maps", _maps(data)),
        ("usage", "Usage", _USAGE),
        ("settings", "Settings", _settings(data, source)),
    ]
    lead = (
        f"<p>{escape(names)}, on {counted(data['samples'], 'captioned image')}; the page shows "
        f"the first {len(data['images'])}.</p>"
    )
    return page(f"Codebook of {names}", sections, lead=lead, data=data, scripts=["explorer.js"])


def _overview(data: Mapping[str, Any]) -> str:
    cards = []
    for i, panel in enumerate(data["panels"]):
        with_words = sum(bool(words) for words in panel["codes"])
        told = [
            f"{panel['size'] - panel['used']} dead",
            f"perplexity {number(panel['perplexity'])}",
            f"{with_words} with a word",
        ]
        cards.append(
            f'<div class="card"><h3>{_swatch(i)}{escape(panel["name"])}</h3><div class="big">'
            f"{panel['used']} of {panel['size']} codes used</div>"
            f'<div class="note">{" · ".join(told)}</div></div>'
        )
    note = (
        f"Counted on {counted(data['samples'], 'image')}: a code is dead if none of them chose "
        "it. It has a word if it is in more images with the word than chance gives, which chance "
        "alone would do for one in a thousand pairs of a code and a word."
    )
    return f'<div class="cards">{"".join(cards)}</div><p class="note">{note}</p>'


def _swatch(panel: int) -> str:
    return f'<span class="swatch" style="background:var(--s{panel + 1})"></span>'


def _maps(data: Mapping[str, Any]) -> str:
    maps = data["maps"]
    if maps is None:
        return (
            "<p>No map: there is no text guide, or fewer than three words that codes stand for "
            "in every checkpoint.</p>"
        )
    told = "; ".join(
        f"<b>{escape(panel['name'])}</b> {number(value, digits=2)}"
        for panel, value in zip(data["panels"], maps["agreement"], strict=True)
    )
    count = len(maps["words"])
    return (
        "<p>Do codes relate to each other as their words do? Correlation of the code map with "
        f'the word map: {told} (1 = the same relations).</p><div class="panels" id="heat"></div>'
        '<div class="tip" id="heat-tip" aria-live="polite"></div>'
        f'<p class="note">Cosines of the {count} commonest words that codes stand for, '
        f"{count * (count - 1) // 2} pairs on {counted(data['samples'], 'image')}. Words: by the "
        "text guide. Codes: a word's code is the mean of the codes that stand for it, by PMI, "
        "about the mean of all used codes. One checkpoint each, so no interval.</p>"
    )


def _settings(data: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    told: dict[str, Any] = {"data": finite(dict(source)), "images": data["samples"]}
    told["words"] = len(data["words"])
    if data["maps"] is not None:
        told["guide"] = data["maps"]["guide"]
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=88)
    return f"<pre>{escape(text)}</pre>"
