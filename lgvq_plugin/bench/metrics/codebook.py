"""How much of the codebook a set of images uses."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Usage, perplexity, dead codes and entropy over all indices since the last reset.

    The histogram is summed over ranks before anything is computed of it. All four depend on the
    window: name it (step, epoch, evaluation set) wherever the numbers are shown.

    Args:
        codebook_size: K.

    Example:
        >>> metric = CodebookUsage(4)
        >>> metric.update(torch.tensor([[0, 1], [0, 1]]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'usage': 0.5, 'perplexity': 2.0, 'dead_codes': 2.0, 'entropy': 1.0}
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
        self.codebook_size = codebook_size
        empty = torch.zeros(codebook_size, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Count indices of any shape.

        Raises:
            ValueError: if one is negative or not below `codebook_size`.
        """
        indices = indices.reshape(-1)
        if indices.numel() == 0:
            return
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"indices must lie in [0, {self.codebook_size}), got {low} to {high}; "
                "is codebook_size that of the host?"
            )
        self.counts += torch.bincount(indices, minlength=self.codebook_size)

    def compute(self) -> dict[str, Tensor]:
        """Return `usage` (share of codes seen), `perplexity`, `dead_codes`, `entropy` in bits."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        nats = torch.special.entr(share).sum()
        is_used = self.counts > 0
        return {
            "usage": is_used.double().mean(),
            "perplexity": nats.exp(),
            "dead_codes": (~is_used).sum(),
            "entropy": nats / torch.log(torch.tensor(2.0, dtype=nats.dtype)),
        }


# -- How codes lie to each other, and which words they answer to; pure functions -----------------


def nearest_code_distances(codebook: Tensor) -> dict[str, float]:
    """Return min, median, mean and max of each code's Euclidean distance to its nearest other.

    Args:
        codebook: (K, C), K >= 2.

    Returns:
        The four in units of the codes' root-mean-square length, and `rms_length` itself.

    Raises:
        ValueError: if there is one code only.

    Example:
        >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(nearest_code_distances(square)["median"], 4)  # 2 / sqrt(2)
        1.4142
    """
    if len(codebook) < 2:
        raise ValueError(f"expected two codes at least, got {tuple(codebook.shape)}")
    codes = codebook.detach().double().cpu()
    length = codes.square().sum(dim=1).mean().sqrt()
    nearest = torch.cat(
        [
            _without_itself(torch.cdist(part, codes, compute_mode=FAST), begin).amin(dim=1)
            for begin, part in zip(range(0, len(codes), 1024), codes.split(1024), strict=True)
        ]
    ) / length.clamp(min=1e-12)
    return {
        "min": float(nearest.min()),
        "median": float(nearest.median()),
        "mean": float(nearest.mean()),
        "max": float(nearest.max()),
        "rms_length": float(length),
    }


FAST = "use_mm_for_euclid_dist"  # in float64, so that near twins stay apart


def _without_itself(distances: Tensor, begin: int) -> Tensor:
    rows = torch.arange(len(distances))
    distances[rows, rows + begin] = torch.inf
    return distances


def similarity_gap(words: Tensor, codes: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """Compare word-word with code-code cosines over pairs of distinct words (paper, table 4).

    Args:
        words: word features, (W, D), or of B captions (B, W, D).
        codes: the code matched to each word, (W, E) or (B, W, E).
        valid: True where a word stands, (W,) or (B, W); None for all.

    Returns:
        `mse` of the cosines, their `pearson` and `spearman` correlation, and the number of
        `pairs`; nan without two words.

    Example:
        >>> similarity_gap(torch.eye(3), 2 * torch.eye(3))["mse"]
        0.0
    """
    words, codes = words.detach().double(), codes.detach().double()
    if words.ndim == 2:
        words, codes = words[None], codes[None]
        valid = None if valid is None else valid[None]
    if valid is None:
        valid = torch.ones(words.shape[:2], dtype=torch.bool)
    length = words.shape[1]
    pair = valid[:, :, None] & valid[:, None, :]
    pair = pair & torch.ones(length, length, dtype=torch.bool).triu(1).to(pair.device)
    wanted, got = _cosines(words)[pair], _cosines(codes)[pair]
    return {
        "mse": float((wanted - got).square().mean()),
        "pearson": _pearson(wanted, got),
        "spearman": _pearson(_ranks(wanted), _ranks(got)),
        "pairs": float(len(wanted)),
    }


def _cosines(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=-1)
    return x @ x.mT


def _pearson(x: Tensor, y: Tensor) -> float:
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    spread = x.norm() * y.norm()
    return float(x @ y / spread) if spread > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[group]


STRONG = 4.0
"""A code answers to a word if their association is above; chance alone: once in 16,000 pairs."""


def word_code_association(has_word: Tensor, has_code: Tensor, *, least: int = 5) -> Tensor:
    """Return how far each code speaks for each word: the signed root of the log-likelihood ratio.

    Both are seen as events of an image. Dunning's ratio is large only where the images are many
    enough, so rare words and codes do not win by chance; its sign is that of the association.

    Args:
        has_word: (M, W) bool: the captions of image m hold word w.
        has_code: (M, K) bool: image m uses code k.
        least: words, and codes, of fewer images get 0 everywhere.

    Returns:
        (W, K) float64.

    Example:
        >>> seen = torch.tensor([[True], [True], [False], [False]])
        >>> round(float(word_code_association(seen, seen, least=1)) ** 2, 4)  # 2 * 4 ln 2
        5.5452
    """
    words, codes = has_word.double(), has_code.double()
    total = float(len(words))
    both = words.mT @ codes
    of_word, of_code = words.sum(0)[:, None], codes.sum(0)[None, :]
    cells = (both, of_word - both, of_code - both, total - of_word - of_code + both)
    sums = (
        of_word * of_code,
        of_word * (total - of_code),
        (total - of_word) * of_code,
        (total - of_word) * (total - of_code),
    )
    ratio = torch.zeros_like(both)
    for cell, product in zip(cells, sums, strict=True):
        ratio += torch.xlogy(cell, cell * total / product.clamp(min=1e-12))
    sign = (both - of_word * of_code / total).sign()
    enough = (of_word >= least) & (of_code >= least)
    return sign * (2 * ratio.clamp(min=0)).sqrt() * enough
