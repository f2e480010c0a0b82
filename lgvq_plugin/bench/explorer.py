"""The codebook explorer: one HTML page with the codes of one or two checkpoints.

Shapes: M images of h x w codes, K codes of width C, W words, patches of p x q pixels.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import pairwise_cosine_similarity
from tqdm import tqdm

from ..files import write_text
from ..guides.base import AbstractGuide
from ..host import decode, encode
from ..sockets import ConfigError
from ..training.build import build_dataset
from ..training.config import Sections
from .metrics.codebook import STRONG, word_code_association
from .page import counted, data_uri, finite, page, png_bytes
from .probes.features import mean_table

PAGE = "codebook.html"
SECTIONS = {
    "overview": "Overview",
    "codes": "Codes",
    "words": "Words",
    "maps": "Similarity maps",
    "usage": "Usage",
    "settings": "Settings",
}
COLUMNS = 32  # patches per row of a sheet
TOP_WORDS, TOP_CODES, MAP_WORDS = 8, 16, 28
MAX_THUMBNAIL, MAX_PATCH = 128, 16  # pixels per side
MIN_IMAGES = 3  # with both a code and a word
_ENGLISH = (
    "a an and are as at be by for from has have in into is it its of on or other over some that "
    "than the their them there these they this to up very was we were which while with you"
)
STOP_WORDS = frozenset(_ENGLISH.split())


@dataclass(frozen=True)
class Samples:
    """Captioned images that the codes are shown on."""

    images: Tensor  # (M, 3, H, W) in [-1, 1]
    captions: list[list[str]]  # of each image
    source: dict[str, Any]  # data section


def read_samples(config: Any, limit: int, *, progress: bool = True) -> Samples:
    """Read the first `limit` samples of the test, else validation, else training data."""
    data = Sections.from_config(config).data
    section = data.test or data.validation or data.train
    dataset = build_dataset(section)
    images, captions = [], []
    count = min(limit, len(dataset))
    for i in tqdm(range(count), unit="image", leave=False, disable=not progress):
        sample = dataset[i]
        image = torch.as_tensor(sample["image"]).float()
        images.append(image if image.shape[0] == 3 else image.movedim(-1, 0))
        own = sample.get("captions") or [sample.get("caption") or ""]
        captions.append([str(caption) for caption in own])
    return Samples(torch.stack(images).contiguous(), captions, dict(section))


def write_explorer(
    hosts: Mapping[str, nn.Module],
    samples: Samples,
    folder: Path,
    *,
    guide: AbstractGuide | None = None,
    shown: int = 48,
    progress: bool = True,
) -> Path:
    """Write codebook.html to `folder`; return its path.

    Args:
        hosts: name -> host in evaluation mode; one, or two to compare.
        samples, folder: images to encode, and the output folder.
        guide: text model of the word similarity map; without one there are no maps.
        shown: number of images on the page; statistics use all samples.
        progress: show a progress bar.
    """
    words = caption_words(samples.captions)
    vocabulary = caption_vocabulary(words)
    has_word = torch.tensor([[word in own for word in vocabulary] for own in words])
    has_word = has_word.reshape(len(words), len(vocabulary))
    panels, vectors = [], []
    for name, host in tqdm(hosts.items(), unit="checkpoint", disable=not progress):
        gathered = gather(host, samples.images)
        has_code = torch.zeros(len(words), len(gathered.counts), dtype=torch.bool)
        has_code.scatter_(1, gathered.indices.flatten(1), True)
        association = associate(has_code, has_word)
        vectors.append(word_vectors(gathered.vectors, association, gathered.counts > 0))
        panels.append(_panel(name, gathered, association, shown))
    maps = _similarity_maps(vocabulary, vectors, guide)
    images = _thumbnails(samples, words, shown)
    names, count = " and ".join(hosts), counted(len(words), "captioned image")
    settings = {"data": samples.source, "images": len(words), "words": len(vocabulary)}
    if maps is not None:
        settings["guide"] = maps["guide"]
    shared = {"panels": panels, "maps": maps, "samples": len(words)}
    documents = has_word.sum(dim=0).tolist()
    text = page(
        f"Codebook of {names}",
        "explorer.html",
        SECTIONS,
        lead=f"{names}, on {count}; the page shows the first {len(images)}.",
        data={**shared, "words": vocabulary, "documents": documents, "images": images},
        scripts=["explorer.js"],
        settings=settings,
        **shared,
    )
    write_text(folder / PAGE, text)
    return folder / PAGE


@dataclass(frozen=True)
class Gathered:
    """The codes of one checkpoint on M images; patches are in [-1, 1]."""

    indices: Tensor  # (M, h, w) int64
    vectors: Tensor  # code vectors, (K, C); without a codebook, the mean of the codes seen
    counts: Tensor  # uses per code, (K,) int64
    mean_patches: Tensor  # mean image patch per code, (K, 3, p, q); gray if dead
    examples: Tensor  # patches from different images, (K, E, 3, p, q); padded with gray
    decoded: Tensor | None  # center of a decoded image filled with the code, (K, 3, p, q)


@torch.no_grad()
def gather(host: nn.Module, images: Tensor, *, examples: int = 6, batch_size: int = 32) -> Gathered:
    """Encode images (M, 3, H, W) in [-1, 1] and cut out the patches of each code.

    Raises:
        ConfigError: if the host returns no indices.
    """
    device = next(host.parameters()).device
    batches = [encode(host, batch.to(device)) for batch in images.split(batch_size)]
    if any(batch.indices is None for batch in batches):
        raise ConfigError(
            f"{type(host).__name__} returns no indices, so its codes cannot be identified"
        )
    index = torch.cat([batch.indices.cpu() for batch in batches])  # type: ignore[union-attr]
    codebook, grid = batches[-1].codebook, batches[-1].grid
    size = int(index.max()) + 1 if codebook is None else len(codebook)
    patches, decoded = cut_patches(images, grid), None
    if codebook is not None:
        vectors = codebook.detach().float().cpu()
        decoded = _decoded(host, vectors.to(device), grid, batch_size)
    else:
        vectors = mean_table(
            torch.cat([batch.codes.float().cpu() for batch in batches]), index, size
        )
    return Gathered(
        indices=index.reshape(len(index), *grid),
        vectors=vectors,
        counts=torch.bincount(index.flatten(), minlength=size),
        mean_patches=mean_table(patches.flatten(2), index, size).unflatten(1, patches.shape[2:]),
        examples=_examples(patches, index, size, examples),
        decoded=decoded,
    )


def cut_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut (M, 3, H, W) images into the patches of their codes, (M, h * w, 3, p, q)."""
    (height, width), (h, w) = images.shape[2:], grid
    p, q = max(1, height // h), max(1, width // w)
    if (height, width) != (h * p, w * q):
        images = F.interpolate(images, (h * p, w * q), mode="area")
    patches = images.unflatten(3, (w, q)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)
    patches = patches.flatten(1, 2)
    if max(p, q) > MAX_PATCH:
        small = min(p, MAX_PATCH), min(q, MAX_PATCH)
        shrunk = F.interpolate(patches.flatten(0, 1), small, mode="area")
        patches = shrunk.unflatten(0, patches.shape[:2])
    return patches


def _examples(patches: Tensor, index: Tensor, size: int, count: int) -> Tensor:
    """Patch at the first position of each code in the first `count` images that contain it."""
    chosen = torch.zeros(size, count, *patches.shape[2:])
    filled = [0] * size
    for image, codes in enumerate(index.tolist()):
        for code in set(codes):
            if filled[code] < count:
                chosen[code, filled[code]] = patches[image, codes.index(code)]
                filled[code] += 1
    return chosen


def _decoded(
    host: nn.Module, vectors: Tensor, grid: tuple[int, int], batch_size: int
) -> Tensor | None:
    center = (grid[0] // 2) * grid[1] + grid[1] // 2
    patches = []
    try:
        for batch in vectors.split(batch_size):
            filled = batch[:, :, None, None].expand(-1, -1, *grid).contiguous()
            patches.append(cut_patches(decode(host, filled).float().cpu(), grid)[:, center])
    except (ConfigError, RuntimeError, TypeError):
        return None  # no decoder, or one that does not take code vectors
    return torch.cat(patches)


def caption_words(captions: Iterable[Iterable[str]]) -> list[set[str]]:
    """Return the words of each image's captions, without stop words.

    Example:
        >>> sorted(caption_words([["A red dog.", "the dog's ball"]])[0])
        ['ball', 'dog', 'red']
    """
    pattern = re.compile(r"[^\W\d_]{2,}(?=['’]|\b)")
    return [
        {word for caption in own for word in pattern.findall(caption.lower())} - STOP_WORDS
        for own in captions
    ]


def caption_vocabulary(words: Sequence[set[str]], *, limit: int = 400) -> list[str]:
    """Return the words of at least three and at most 90 % of the images, by frequency."""
    counts = Counter(word for own in words for word in own)
    kept = [(-n, word) for word, n in counts.items() if MIN_IMAGES <= n <= 0.9 * len(words)]
    return [word for _, word in sorted(kept)[:limit]]


@dataclass(frozen=True)
class Association:
    """Co-occurrence of codes and words in images, each (K, W)."""

    pmi: Tensor  # log2 of (images with both) / (expected by chance); -inf if there are none
    strength: Tensor  # signed root of the likelihood ratio of the 2 x 2 table
    joint: Tensor  # number of images with both

    @property
    def is_sure(self) -> Tensor:
        """Whether code and word co-occur significantly more often than by chance, (K, W) bool."""
        return (self.strength > STRONG) & (self.joint >= MIN_IMAGES)


def associate(has_code: Tensor, has_word: Tensor) -> Association:
    """Relate the presence of codes (M, K) and words (M, W), both bool."""
    code, word = has_code.double(), has_word.double()
    joint = code.T @ word
    pmi = torch.log2(joint * len(code) / torch.outer(code.sum(0), word.sum(0)).clamp(min=1))
    return Association(pmi, word_code_association(has_word, has_code, min_count=1).T, joint.long())


def word_vectors(vectors: Tensor, association: Association, is_used: Tensor) -> Tensor:
    """Return the PMI-weighted mean code of each word, relative to the mean of all used codes.

    Codes (K, C) and a mask of used ones (K,) to (W, C); nan for words without an associated code.
    """
    weight = association.pmi.clamp(min=0).nan_to_num(posinf=0) * association.is_sure
    centered = vectors.double() - vectors[is_used].double().mean(dim=0)
    total = weight.sum(dim=0)[:, None]
    return torch.where(total > 0, (weight.T @ centered) / total.clamp(min=1e-12), torch.nan)


def agreement(first: Tensor, second: Tensor) -> float | None:
    """Correlate two similarity maps (W, W) over pairs of distinct words; None for fewer than 3."""
    upper = torch.triu(torch.ones_like(first, dtype=torch.bool), diagonal=1)
    pairs = torch.stack([first[upper].double(), second[upper].double()])
    pairs = pairs[:, pairs.isfinite().all(dim=0)]
    if pairs.shape[1] < 3 or bool((pairs.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(pairs)[0, 1])


def tile(patches: Tensor, columns: int) -> Tensor:
    """Arrange patches (K, 3, p, q) in one image, (3, rows * p, columns * q)."""
    padding = -len(patches) % columns
    grid = F.pad(patches, (0, 0, 0, 0, 0, 0, 0, padding)).unflatten(0, (-1, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def _panel(name: str, gathered: Gathered, association: Association, shown: int) -> dict[str, Any]:
    counts, examples = gathered.counts, gathered.examples
    share = counts.double() / counts.sum()
    sheets = {"mean": gathered.mean_patches, "examples": examples.flatten(0, 1)}
    if gathered.decoded is not None:
        sheets["decoded"] = gathered.decoded
    by_word = Association(association.pmi.T, association.strength.T, association.joint.T)
    return {
        "name": name,
        "size": len(counts),
        "counts": counts.tolist(),
        "used": int((counts > 0).sum()),
        "perplexity": float(torch.special.entr(share).sum().exp()),
        "grid": list(gathered.indices.shape[1:]),
        "patch": list(gathered.mean_patches.shape[2:]),
        "columns": COLUMNS,
        "examples": examples.shape[1],
        "sheets": {
            kind: data_uri(png_bytes(tile(patches, COLUMNS)), "image/png")
            for kind, patches in sheets.items()
        },
        "codes": _top(association, TOP_WORDS),
        "words": _top(by_word, TOP_CODES),
        "fires": gathered.indices[:shown].flatten(1).tolist(),
    }


def _top(association: Association, count: int) -> list[list[list[float]]]:
    """Return the strongest columns of each row: [column, pmi, images with both]."""
    score = association.strength.masked_fill(~association.is_sure, -1)
    best = score.topk(min(count, score.shape[1]), dim=1)
    pmi, joint = association.pmi.gather(1, best.indices), association.joint.gather(1, best.indices)
    rows = zip(*(x.tolist() for x in (best.indices, pmi, joint, best.values)), strict=True)
    return [
        [
            [column, round(pmi, 3), joint]
            for column, pmi, joint, value in zip(*row, strict=True)
            if value > 0
        ]
        for row in rows
    ]


def _thumbnails(samples: Samples, words: Sequence[set[str]], shown: int) -> list[dict[str, Any]]:
    images = samples.images[:shown]
    if max(images.shape[2:]) > MAX_THUMBNAIL:
        factor = MAX_THUMBNAIL / max(images.shape[2:])
        images = F.interpolate(images, scale_factor=factor, mode="area")
    uris = [data_uri(png_bytes(image), "image/png") for image in images]
    return [
        {"uri": uri, "caption": (captions or [""])[0], "words": sorted(own)}
        for uri, captions, own in zip(uris, samples.captions, words, strict=False)
    ]


def _similarity_maps(
    vocabulary: Sequence[str], vectors: Sequence[Tensor], guide: AbstractGuide | None
) -> dict[str, Any] | None:
    """Cosines of the most frequent words that have codes: by the guide and by each codebook."""
    if guide is None or not vocabulary:
        return None
    has_codes = torch.stack([rows.isfinite().all(dim=1) for rows in vectors]).all(dim=0)
    chosen = has_codes.nonzero()[:MAP_WORDS, 0]
    if len(chosen) < 3:
        return None
    words = [vocabulary[i] for i in chosen.tolist()]
    of_words, *of_codes = (
        pairwise_cosine_similarity(rows.double().cpu(), zero_diagonal=False)
        for rows in (guide.encode(words).sentence.float(), *(rows[chosen] for rows in vectors))
    )
    return {
        "words": words,
        "guide": {"class": type(guide).__name__, **finite(guide.config)},
        "word": finite(of_words.round(decimals=3).tolist()),
        "codes": [finite(one.round(decimals=3).tolist()) for one in of_codes],
        "agreement": [agreement(of_words, one) for one in of_codes],
    }
