"""What a codebook shows on captioned images: patches, words, similarities. Tensors in and out.

M images with h x w codes each, K codes of width C, W words, patches of p x q pixels.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_text
from ..guides.base import AbstractGuide
from ..host import decode, encode
from ..sockets import ConfigError
from ..training.build import build_dataset
from .metrics.codebook import STRONG, word_code_association
from .page import counted, data_uri, finite, page, png_bytes

_ENGLISH = (
    "a an and are as at be by for from has have in into is it its of on or other over some that "
    "than the their them there these they this to up very was we were which while with you"
)
COMMON = frozenset(_ENGLISH.split())
LARGEST_PATCH = 16  # pixels a side, on the page
LEAST = 3  # images in which a code and a word meet


@dataclass(frozen=True)
class Gathered:
    """One checkpoint's codes on M images.

    Args:
        indices: the code at each place, (M, h, w) int64.
        vectors: of the codes, (K, C); of a host without a codebook the mean of what was seen.
        counts: how often each code was chosen, (K,) int64.
        mean_patches: mean of the patches where a code fires, (K, 3, p, q) in [-1, 1]; gray if dead.
        examples: patches from different images, (K, E, 3, p, q); gray where there are fewer.
        decoded: middle of the decoded image that is filled with the code, (K, 3, p, q), or None.
    """

    indices: Tensor
    vectors: Tensor
    counts: Tensor
    mean_patches: Tensor
    examples: Tensor
    decoded: Tensor | None


@torch.no_grad()
def gather(host: nn.Module, images: Tensor, *, examples: int = 6, batch_size: int = 32) -> Gathered:
    """Encode images and cut out what each code stands for.

    Args:
        host: in evaluation mode.
        images: (M, 3, H, W) float32 in [-1, 1], on the CPU.
        examples: patches kept of each code.
        batch_size: images encoded at a time.

    Raises:
        ConfigError: if the host tells no indices.
    """
    device = next(host.parameters()).device
    indices, codes, codebook, grid = [], [], None, (1, 1)
    for some in images.split(batch_size):
        found = encode(host, some.to(device))
        if found.indices is None:
            raise ConfigError(f"{type(host).__name__} tells no indices, so its codes have no names")
        indices.append(found.indices.cpu())
        codes.append(found.codes.float().cpu())
        codebook, grid = found.codebook, found.grid
    index, code = torch.cat(indices), torch.cat(codes)
    size = int(index.max()) + 1 if codebook is None else len(codebook)
    counts = torch.bincount(index.flatten(), minlength=size)
    vectors = codebook.detach().float().cpu() if codebook is not None else _means(code, index, size)
    patches = cut_patches(images, grid)
    return Gathered(
        indices=index.reshape(len(index), *grid),
        vectors=vectors,
        counts=counts,
        mean_patches=_means(patches.flatten(2), index, size).reshape(size, *patches.shape[2:]),
        examples=_examples(patches, index, size, examples),
        decoded=_decoded(host, vectors.to(device), grid, batch_size)
        if codebook is not None
        else None,
    )


def cut_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut (M, 3, H, W) images into the patches under each code, (M, h * w, 3, p, q).

    Example:
        >>> cut_patches(torch.arange(16.0).reshape(1, 1, 4, 4), (2, 2))[0, 1]
        tensor([[[2., 3.],
                 [6., 7.]]])
    """
    (high, wide), (h, w) = images.shape[2:], grid
    p, q = max(1, high // h), max(1, wide // w)
    images = (
        F.interpolate(images, (h * p, w * q), mode="area")
        if (high, wide) != (h * p, w * q)
        else images
    )
    cells = images.reshape(len(images), -1, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
    cells = cells.reshape(len(images), h * w, -1, p, q)
    if max(p, q) > LARGEST_PATCH:
        small = (min(p, LARGEST_PATCH), min(q, LARGEST_PATCH))
        cells = F.interpolate(cells.flatten(0, 1), small, mode="area").unflatten(0, cells.shape[:2])
    return cells


def _means(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of values (M, N, D) over the places of each code: (K, D); 0 for a dead code."""
    flat = values.flatten(0, 1)
    sums = torch.zeros(size, flat.shape[1]).index_add_(0, index.flatten(), flat)
    counts = torch.bincount(index.flatten(), minlength=size)
    return sums / counts.clamp(min=1)[:, None]


def _examples(patches: Tensor, index: Tensor, size: int, count: int) -> Tensor:
    """Take the first place in each of the first `count` images that have the code."""
    chosen = torch.zeros(size, count, *patches.shape[2:])
    filled = [0] * size
    for image, row in enumerate(index.tolist()):
        for code, place in {code: place for place, code in reversed([*enumerate(row)])}.items():
            if filled[code] < count:
                chosen[code, filled[code]] = patches[image, place]
                filled[code] += 1
    return chosen


def _decoded(
    host: nn.Module, vectors: Tensor, grid: tuple[int, int], batch_size: int
) -> Tensor | None:
    middle = (grid[0] // 2) * grid[1] + grid[1] // 2
    cut = []
    try:
        for some in vectors.split(batch_size):
            filled = some[:, :, None, None].expand(-1, -1, *grid).contiguous()
            cut.append(cut_patches(decode(host, filled).float().cpu(), grid)[:, middle])
    except (ConfigError, RuntimeError, TypeError):
        return None  # no decode, or one that takes something else than code vectors
    return torch.cat(cut)


def words_of(captions: Iterable[Iterable[str]]) -> list[set[str]]:
    """Return the words of each image's captions, without the commonest of English.

    Example:
        >>> sorted(words_of([["A red dog.", "the dog's ball"]])[0])
        ['ball', 'dog', 'red']
    """
    return [
        {
            word
            for caption in of_image
            for word in re.findall(r"[^\W\d_]+(?=['’]|\b)", caption.lower())
            if word not in COMMON and len(word) > 1
        }
        for of_image in captions
    ]


def caption_vocabulary(words: Sequence[set[str]], *, limit: int = 400) -> list[str]:
    """Return the words of at least three images and not of nearly all, the commonest first."""
    counts = Counter(word for some in words for word in some)
    most = 0.9 * len(words)
    kept = [(n, word) for word, n in counts.items() if LEAST <= n <= most]
    return [word for _, word in sorted(kept, key=lambda pair: (-pair[0], pair[1]))[:limit]]


def presence(indices: Tensor, size: int) -> Tensor:
    """Return whether each code is in each image: (M, h, w) to (M, K) bool."""
    flat = indices.flatten(1)
    found = torch.zeros(len(flat), size, dtype=torch.bool)
    return found.scatter_(1, flat, True)


@dataclass(frozen=True)
class Association:
    """How codes and words meet in images, each (K, W).

    Args:
        pmi: log2 of (images with both) / (as many as chance gives); -inf where they never meet.
        strength: signed root of the likelihood ratio of the 2 x 2 table, 0 if independent.
        joint: images with both.
    """

    pmi: Tensor
    strength: Tensor
    joint: Tensor

    @property
    def is_sure(self) -> Tensor:
        """Whether the code is used more with the word, more than chance gives, (K, W) bool."""
        return (self.strength > STRONG) & (self.joint >= LEAST)


def associate(has_code: Tensor, has_word: Tensor) -> Association:
    """Compare presence of codes (M, K) and words (M, W), both bool.

    Example:
        >>> both = torch.tensor([[True], [True], [False], [False]])
        >>> associate(both, both).pmi
        tensor([[1.]], dtype=torch.float64)
    """
    code, word = has_code.double(), has_word.double()
    images = float(len(code))
    joint = code.T @ word
    codes, words = code.sum(0)[:, None], word.sum(0)[None, :]
    pmi = torch.log2(joint * images / (codes * words).clamp(min=1))
    return Association(pmi, word_code_association(has_word, has_code, min_count=1).T, joint.long())


def word_vectors(vectors: Tensor, association: Association, is_used: Tensor) -> Tensor:
    """Return the mean code of each word, by PMI, about the mean of all used codes.

    Args:
        vectors: of the codes, (K, C).
        association: of codes and words.
        is_used: whether a code is not dead, (K,) bool.

    Returns:
        (W, C); rows of nan for words that no code stands for.
    """
    weight = association.pmi.clamp(min=0).nan_to_num(posinf=0) * association.is_sure
    centered = vectors.double() - vectors[is_used].double().mean(dim=0)
    total = weight.sum(dim=0)[:, None]
    return torch.where(total > 0, (weight.T @ centered) / total.clamp(min=1e-12), torch.nan)


def cosines(rows: Tensor) -> Tensor:
    """Return all cosines of the rows, (W, W)."""
    rows = F.normalize(rows.double(), dim=-1)
    return rows @ rows.T


def agreement(first: Tensor, second: Tensor) -> float | None:
    """Correlate two similarity maps (W, W) over pairs of distinct words; None for fewer than 3.

    Example:
        >>> some = torch.tensor([[1.0, 0.2, 0.5], [0.2, 1.0, 0.1], [0.5, 0.1, 1.0]])
        >>> round(agreement(some, 2 * some), 6)
        1.0
    """
    upper = torch.triu(torch.ones_like(first, dtype=torch.bool), diagonal=1)
    pairs = torch.stack([first[upper].double(), second[upper].double()])
    pairs = pairs[:, pairs.isfinite().all(dim=0)]
    if pairs.shape[1] < 3 or bool((pairs.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(pairs)[0, 1])


def tile(patches: Tensor, columns: int) -> Tensor:
    """Lay patches (K, 3, p, q) out as one image, (3, rows * p, columns * q)."""
    count, _, p, q = patches.shape
    rows = -(-count // columns)
    missing = patches.new_zeros(rows * columns - count, *patches.shape[1:])
    grid = torch.cat([patches, missing]).reshape(rows, columns, -1, p, q)
    return grid.permute(2, 0, 3, 1, 4).reshape(-1, rows * p, columns * q)


# -- `lgvq inspect`: a page on which a codebook can be looked at, one or two checkpoints of it ----


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
    words = words_of(samples.captions)
    vocabulary = caption_vocabulary(words)
    has_word = torch.tensor([[word in some for word in vocabulary] for some in words])
    has_word = has_word.reshape(len(words), len(vocabulary))
    panels, vectors = [], []
    for name, host in tqdm(hosts.items(), unit="checkpoint", disable=not progress):
        gathered = gather(host, samples.images)
        has_code = presence(gathered.indices, len(gathered.counts))
        association = associate(has_code, has_word)
        vectors.append(word_vectors(gathered.vectors, association, gathered.counts > 0))
        panels.append(_panel(name, gathered, association, shown))
    data = {
        "panels": panels,
        "words": vocabulary,
        "documents": has_word.sum(dim=0).tolist(),
        "samples": len(samples.images),
        "images": _thumbnails(samples, words, shown),
        "maps": _code_maps(vocabulary, vectors, guide),
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


def _panel(name: str, gathered: Gathered, association: Association, shown: int) -> dict[str, Any]:
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
            Association(association.pmi.T, association.strength.T, association.joint.T),
            TOP_CODES,
        ),
        "fires": gathered.indices[:shown].flatten(1).tolist(),
    }


def _sheet(patches: Tensor) -> str:
    return data_uri(png_bytes(tile(patches, COLUMNS)), "image/png")


def _top(association: Association, count: int) -> list[list[list[float]]]:
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


def _code_maps(
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
    of_words = cosines(guide.encode(words).sentence.float().cpu())
    of_codes = [cosines(rows[chosen]) for rows in vectors]
    return {
        "words": words,
        "guide": {"class": type(guide).__name__, **finite(guide.config)},
        "word": finite(of_words.round(decimals=3).tolist()),
        "codes": [finite(one.round(decimals=3).tolist()) for one in of_codes],
        "agreement": [agreement(of_words, one) for one in of_codes],
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
