"""`lgvq inspect`: a page on which a codebook can be looked at, one or two checkpoints of it.

checkpoint, captioned images --gather--> codes as patches, their words, where they fire, what is
dead, and whether codes relate to each other as words do
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

from .._files import write_text
from ..guides.base import AbstractGuide
from ..training.base import build_dataset
from . import _codebook
from ._page import counted, data_uri, finite, page, png_bytes

PAGE = "codebook.html"
COLUMNS = 32  # tiles in a row of a sheet
THUMBNAIL = 128  # pixels a side, at most
SECTIONS = {
    "overview": "Overview",
    "codes": "Codes",
    "words": "Words",
    "maps": "Similarity maps",
    "usage": "Usage",
    "settings": "Settings",
}
TOP_WORDS, TOP_CODES, MAP_WORDS = 8, 16, 28


@dataclass(frozen=True)
class Samples:
    """The images that codes are looked at on.

    Args:
        images: (M, 3, H, W) in [-1, 1].
        captions: of each image.
        source: the data section that they came from.
    """

    images: Tensor
    captions: list[list[str]]
    source: dict[str, Any]


def write_explorer(
    hosts: Mapping[str, torch.nn.Module],
    samples: Samples,
    folder: Path,
    *,
    guide: AbstractGuide | None = None,
    shown: int = 48,
    progress: bool = True,
) -> Path:
    """Write the page.

    Args:
        hosts: name -> host in evaluation mode; one, or two side by side.
        samples: what they encode.
        folder: gets codebook.html.
        guide: text model for the word-word map; without it there are no maps.
        shown: images on the page; all samples are counted.
        progress: whether to show a bar.

    Returns:
        The path of the page.
    """
    words = _codebook.words_of(samples.captions)
    vocabulary = _codebook.vocabulary(words)
    has_word = torch.tensor([[word in some for word in vocabulary] for some in words])
    has_word = has_word.reshape(len(words), len(vocabulary))
    panels, vectors = [], []
    for name, host in tqdm(hosts.items(), unit="checkpoint", disable=not progress):
        gathered = _codebook.gather(host, samples.images)
        has_code = _codebook.presence(gathered.indices, len(gathered.counts))
        association = _codebook.associate(has_code, has_word)
        vectors.append(_codebook.word_vectors(gathered.vectors, association, gathered.counts > 0))
        panels.append(_panel(name, gathered, association, shown))
    data = {
        "panels": panels,
        "words": vocabulary,
        "documents": has_word.sum(dim=0).tolist(),
        "samples": len(samples.images),
        "images": _thumbnails(samples, words, shown),
        "maps": _maps(vocabulary, vectors, guide),
    }
    path = folder / PAGE
    write_text(path, _page_of(data, samples.source))
    return path


def _page_of(data: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Return the page's frame around the data; explorer.js fills it."""
    names = " and ".join(panel["name"] for panel in data["panels"])
    told: dict[str, Any] = {"data": finite(dict(source)), "images": data["samples"]}
    told["words"] = len(data["words"])
    if data["maps"] is not None:
        told["guide"] = data["maps"]["guide"]
    lead = (
        f"{names}, on {counted(data['samples'], 'captioned image')}; the page shows "
        f"the first {len(data['images'])}."
    )
    return page(
        f"Codebook of {names}",
        "explorer.html",
        SECTIONS,
        lead=lead,
        data=data,
        scripts=["explorer.js"],
        panels=data["panels"],
        maps=data["maps"],
        samples=data["samples"],
        settings=yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=88),
    )


def _panel(
    name: str, gathered: _codebook.Gathered, association: _codebook.Association, shown: int
) -> dict[str, Any]:
    counts = gathered.counts
    share = counts.double() / counts.sum()
    sheets = {"mean": gathered.mean_patches, "examples": gathered.examples.flatten(0, 1)}
    if gathered.decoded is not None:
        sheets["decoded"] = gathered.decoded
    return {
        "name": name,
        "size": len(counts),
        "counts": counts.tolist(),
        "used": int((counts > 0).sum()),
        "perplexity": float(torch.special.entr(share).sum().exp()),
        "grid": list(gathered.indices.shape[1:]),
        "patch": list(gathered.mean_patches.shape[2:]),
        "columns": COLUMNS,
        "examples": gathered.examples.shape[1],
        "sheets": {kind: _sheet(patches) for kind, patches in sheets.items()},
        "codes": _top(association, TOP_WORDS),
        "words": _top(
            _codebook.Association(association.pmi.T, association.strength.T, association.joint.T),
            TOP_CODES,
        ),
        "fires": gathered.indices[:shown].flatten(1).tolist(),
    }


def _sheet(patches: Tensor) -> str:
    return data_uri(png_bytes(_codebook.tile(patches, COLUMNS)), "image/png")


def _top(association: _codebook.Association, count: int) -> list[list[list[float]]]:
    """For each row the surest columns: [column, pmi, images with both]."""
    score = association.strength.masked_fill(~association.is_sure, -1)
    best = score.topk(min(count, score.shape[1]), dim=1)
    return [
        [
            [
                column,
                round(float(association.pmi[row, column]), 3),
                int(association.joint[row, column]),
            ]
            for column, value in zip(columns, values, strict=True)
            if value > 0
        ]
        for row, (columns, values) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]


def _thumbnails(samples: Samples, words: Sequence[set[str]], shown: int) -> list[dict[str, Any]]:
    images = samples.images[:shown]
    if max(images.shape[2:]) > THUMBNAIL:
        factor = THUMBNAIL / max(images.shape[2:])
        images = F.interpolate(images, scale_factor=factor, mode="area")
    return [
        {
            "uri": data_uri(png_bytes(image), "image/png"),
            "caption": (captions or [""])[0],
            "words": sorted(some),
        }
        for image, captions, some in zip(images, samples.captions, words, strict=False)
    ]


def _maps(
    vocabulary: Sequence[str], vectors: Sequence[Tensor], guide: AbstractGuide | None
) -> dict[str, Any] | None:
    """Cosines of the commonest words that codes stand for, by the guide and by each codebook."""
    if guide is None or not vocabulary:
        return None
    has_codes = torch.stack([rows.isfinite().all(dim=1) for rows in vectors]).all(dim=0)
    chosen = has_codes.nonzero()[:MAP_WORDS, 0]
    if len(chosen) < 3:
        return None
    words = [vocabulary[i] for i in chosen.tolist()]
    of_words = _codebook.cosines(guide.encode(words).sentence.float().cpu())
    of_codes = [_codebook.cosines(rows[chosen]) for rows in vectors]
    return {
        "words": words,
        "guide": {"class": type(guide).__name__, **finite(guide.config)},
        "word": finite(of_words.round(decimals=3).tolist()),
        "codes": [finite(one.round(decimals=3).tolist()) for one in of_codes],
        "agreement": [_codebook.agreement(of_words, one) for one in of_codes],
    }


def read_samples(section: Mapping[str, Any], limit: int) -> Samples:
    """Read the first `limit` samples of a data section `{target, params}`."""
    dataset = build_dataset(section)
    images, captions = [], []
    for i in tqdm(range(min(limit, len(dataset))), unit="image", leave=False):
        sample = dataset[i]
        image = torch.as_tensor(sample["image"]).float()
        images.append(image if image.shape[0] == 3 else image.movedim(-1, 0))
        of_image = sample.get("captions") or [sample.get("caption") or ""]
        captions.append([str(caption) for caption in of_image])
    return Samples(torch.stack(images).contiguous(), captions, dict(section))
