"""The codebook: how much of it is used, its geometry, and which words its codes go with."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

STRONG = 4.0
"""A code goes with a word if their association is above this; by chance 1 in 16,000 pairs is."""


class CodebookUsage(Metric):
    """Usage, perplexity, dead codes and entropy over all indices since the last reset.

    The counts are summed over ranks before anything is computed from them. All four numbers depend
    on the set of images: report it (step, epoch, evaluation set) with them. `codebook_size` is K.

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
            ValueError: if one is outside [0, `codebook_size`).
        """
        indices = indices.reshape(-1)
        if indices.numel() == 0:
            return
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"indices must be in [0, {self.codebook_size}), got {low} to {high}; "
                "is codebook_size that of the host?"
            )
        self.counts += torch.bincount(indices, minlength=self.codebook_size)

    def compute(self) -> dict[str, Tensor]:
        """Return `usage` (share of codes used), `perplexity`, `dead_codes`, `entropy` in bits."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        nats = torch.special.entr(share).sum()
        is_used = self.counts > 0
        return {
            "usage": is_used.double().mean(),
            "perplexity": nats.exp(),
            "dead_codes": (~is_used).sum(),
            "entropy": nats / torch.log(torch.tensor(2.0, dtype=nats.dtype)),
        }


def nearest_code_distances(codebook: Tensor) -> dict[str, float]:
    """Return `min`, `median`, `mean` and `max` of the distance of codes to their nearest neighbor.

    They are in units of the root-mean-square length of the codes (K, C), which is `rms_length`.

    Raises:
        ValueError: if there is only one code.

    Example:
        >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(nearest_code_distances(square)["median"], 4)  # 2 / sqrt(2)
        1.4142
    """
    if len(codebook) < 2:
        raise ValueError(f"expected at least two codes, got {tuple(codebook.shape)}")
    codes = codebook.detach().double().cpu()
    parts = []
    for rows in torch.arange(len(codes)).split(1024):
        distances = torch.cdist(codes[rows], codes, compute_mode="use_mm_for_euclid_dist")
        parts.append(distances.scatter_(1, rows[:, None], torch.inf).amin(dim=1))
    length = codes.square().sum(dim=1).mean().sqrt()
    nearest = torch.cat(parts) / length.clamp(min=1e-12)
    means = {name: float(getattr(nearest, name)()) for name in ("min", "median", "mean", "max")}
    return means | {"rms_length": float(length)}


def similarity_gap(words: Tensor, codes: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """Compare word-word with code-code cosines over pairs of distinct words (paper, table 4).

    Word features are (W, D), or (B, W, D) for B captions, the codes matched to them (W, E) or
    (B, W, E), and `valid` is True for real words, (W,) or (B, W); None: all. Returns `mse` of the
    cosines, their `pearson` and `spearman` correlation, and the number of `pairs`; nan without any.

    Example:
        >>> similarity_gap(torch.eye(3), 2 * torch.eye(3))["mse"]
        0.0
    """
    if words.ndim == 2:
        words, codes = words[None], codes[None]
        valid = None if valid is None else valid[None]
    if valid is None:
        valid = torch.ones(words.shape[:2], dtype=torch.bool)
    wanted, got = (
        torch.cat([_pair_cosines(row[keep]) for row, keep in zip(x.detach(), valid, strict=True)])
        for x in (words, codes)
    )
    return {
        "mse": float((wanted - got).square().mean()),
        **_correlations(wanted, got),
        "pairs": float(len(wanted)),
    }


def _pair_cosines(rows: Tensor) -> Tensor:
    """Return the cosines of all pairs of rows (N, D), (N (N - 1) / 2,) float64."""
    unit = F.normalize(rows.double(), dim=-1)
    return (unit @ unit.mT)[torch.triu_indices(len(rows), len(rows), offset=1).unbind()]


def _correlations(x: Tensor, y: Tensor) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return {"pearson": float("nan"), "spearman": float("nan")}
    pair = x.cpu().numpy(), y.cpu().numpy()
    return {"pearson": float(pearsonr(*pair)[0]), "spearman": float(spearmanr(*pair)[0])}


def word_code_association(has_word: Tensor, has_code: Tensor, *, min_count: int = 5) -> Tensor:
    """Return the signed root of Dunning's log-likelihood ratio of each word and code.

    Words (M, W) and codes (M, K) are seen as events of M images, both bool. The ratio is large only
    with enough images, so rare words and codes do not win by chance; the sign is that of the
    association. Words and codes of fewer than `min_count` images get 0. Returns (W, K) float64.

    Example:
        >>> seen = torch.tensor([[True], [True], [False], [False]])
        >>> round(float(word_code_association(seen, seen, min_count=1)) ** 2, 4)  # 2 * 4 ln 2
        5.5452
    """
    words, codes = has_word.double(), has_code.double()
    total = float(len(words))
    both = words.mT @ codes
    of_word, of_code = words.sum(0)[:, None], codes.sum(0)[None, :]
    cells = (both, of_word - both, of_code - both, total - of_word - of_code + both)
    sums = [w * c for w in (of_word, total - of_word) for c in (of_code, total - of_code)]
    ratio = torch.zeros_like(both)
    for cell, product in zip(cells, sums, strict=True):
        ratio += torch.xlogy(cell, cell * total / product.clamp(min=1e-12))
    sign = (both - of_word * of_code / total).sign()
    is_frequent = (of_word >= min_count) & (of_code >= min_count)
    return sign * (2 * ratio.clamp(min=0)).sqrt() * is_frequent
