"""The equations of LG-VQ (arXiv 2405.14206) as pure functions.

Everything is computed in float32, also under autocast; cosines have their eps in the norm, so that
a zero vector has cosine 0 and a finite gradient.

Where the released code adds an eps to a divisor (1e-6 to L_gsa's denominator, 5e-6 to L_mtp's
count), the quotient here is exact: values differ by less than 3e-6 (L_gsa, batch of one; less for
more) and by 5e-6 of the value (L_mtp, one masked word; less for more).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .types import Codes, PastPairs

NORM_EPSILON = 1e-6
"""Added, squared, to squared norms: cosines of vectors longer than 3e-4 are exact to 1e-5."""

MAX_SKIPPED = 25
"""Updates in a row that may be left out: by then fp16's scale has fallen from 2^16 to 2^-9."""

LARGEST_GRADIENT = 1e19
"""Beyond 1.8e19 the squares that Adam keeps are infinite in float32."""


def global_semantic_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    same: Tensor | None = None,
    past: PastPairs | None = None,
) -> Tensor:
    """InfoNCE between image and caption features, L_gsa (Eq. 5).

    Args:
        image: code-ViT summaries, (B, D).
        text: caption features, (B, D); a target, so no gradient flows into it.
        temperature: divides the cosines; 1 in the paper.
        symmetric: average with the text-to-image direction.
        same: True where another pair has the same caption, (B, B); excluded from the negatives.
        past: M further negatives without gradient (cross-batch memory, Wang et al. 2020).

    Returns:
        Scalar, the mean over the batch; 0 with a gradient path for an empty batch.

    Example:
        >>> eye = torch.eye(2)
        >>> global_semantic_loss(eye, eye)  # -log(e / (e + 1))
        tensor(0.3133)
    """
    if len(image) == 0:
        return (image.float() / temperature).sum()
    to_text = cosines(image, text.detach())
    to_image, past_same = to_text.mT, None
    if past is not None:
        to_text = torch.cat([to_text, cosines(image, past.text)], dim=1)
        to_image = torch.cat([to_image, cosines(text, past.image)], dim=1)
        past_same = past.same
    loss = contrast(to_text, temperature, same, past_same)
    return (loss + contrast(to_image, temperature, same, past_same)) / 2 if symmetric else loss


def contrast(
    scores: Tensor,
    temperature: float | Tensor,
    same: Tensor | None = None,
    past_same: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of scores (B, B + M) with the targets on the diagonal; `same` is excluded."""
    logits = scores / temperature
    count = len(logits)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if same is not None:
        excluded[:, :count] = same
    if past_same is not None:
        excluded[:, count:] = past_same
    logits = logits.masked_fill(excluded.fill_diagonal_(False), float("-inf"))
    return F.cross_entropy(logits, torch.arange(count, device=logits.device))


def masked_text_loss(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of the masked words, L_mtp (Eq. 6, its sign corrected).

    Args:
        logits: (B, T, V), or (M, V) of the masked words alone.
        targets: token ids, (B, T) or (M,) int64.
        mask: True at masked words, (B, T) bool; None takes all rows.
        label_smoothing: 0.1 in the released code, none in the paper.

    Returns:
        Scalar, the mean over masked positions; 0 with a gradient path where none is masked.

    Example:
        >>> logits = torch.zeros(1, 2, 4)
        >>> masked_text_loss(logits, torch.zeros(1, 2).long(), torch.tensor([[True, False]]))
        tensor(1.3863)
    """
    if mask is not None:
        logits, targets = logits[mask], targets[mask]
    if len(logits) == 0:
        return logits.float().sum()
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def relationship_loss(
    words: Tensor,
    word_mask: Tensor,
    tokens: Tensor,
    codes: Tensor,
    *,
    variant: Literal["paper", "pairs"] = "paper",
    temperature: float = 0.1,
    matching: Literal["soft", "straight_through"] = "soft",
) -> Tensor:
    """Mean squared gap between word-word and code-code cosines, L_ras (Eq. 7 and 8).

    `paper` is the released arithmetic: a word takes the code of its best token, with the sign of
    their cosine, and the mean includes padding and the diagonal of the T x T cells. `pairs`
    matches softly, so that tokens get a gradient, and averages over pairs of distinct words.

    Args:
        words: text features, (B, T, D); a target, so no gradient flows into it.
        word_mask: True at words, (B, T) bool.
        tokens: the code-ViT's patch tokens, (B, N, D).
        codes: code vectors, projected or raw, (B, N, E).
        variant: see above.
        temperature: temperature of the soft matching; `pairs` only.
        matching: `soft` mixes codes by softmax; `straight_through` takes the best code, with the
            gradient of `soft`; `pairs` only.

    Returns:
        Scalar; 0 with a gradient path if `pairs` finds no caption of two words.

    Raises:
        ValueError: for another variant or matching.

    Example:
        >>> eye = torch.eye(3)[None]
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> relationship_loss(eye, mask, eye, eye, variant="paper")
        tensor(0.)
    """
    if variant not in ("paper", "pairs"):
        raise ValueError(f"variant must be 'paper' or 'pairs', got {variant!r}")
    if matching not in ("soft", "straight_through"):
        raise ValueError(f"matching must be 'soft' or 'straight_through', got {matching!r}")
    words, codes = words.detach(), codes.float()
    similarity = cosines(words, tokens)  # (B, T, N)
    pair = word_mask[:, :, None] & word_mask[:, None, :]
    if variant == "paper":
        best, match = similarity.max(dim=-1, keepdim=True)
        # The released code scales by the cosine, which the normalization reduces to its sign (so
        # the tokens get no gradient), and divides by zero at a cosine of 0.
        matched = codes.take_along_dim(match, dim=1) * best.detach().sign()
        gap = (cosines(matched, matched) - cosines(words, words)).masked_fill(~pair, 0.0)
        return gap.square().mean() if gap.numel() else codes.sum()
    share = (similarity / temperature).softmax(dim=-1)
    if matching == "straight_through":
        best = torch.zeros_like(share).scatter(-1, share.argmax(dim=-1, keepdim=True), 1.0)
        share = best + (share - share.detach())
    matched = _matmul(share, codes)
    gap = cosines(matched, matched) - cosines(words, words)
    pair = pair & ~torch.eye(pair.shape[-1], dtype=torch.bool, device=pair.device)
    return gap.square().masked_fill(~pair, 0.0).sum() / pair.sum().clamp(min=1)


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosine of each row with each column, (..., R, D) and (..., C, D) -> (..., R, C) float32.

    Example:
        >>> cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.]])
    """
    unit = _unit(rows.float())
    return _matmul(unit, (unit if columns is rows else _unit(columns.float())).mT)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.square().sum(dim=-1, keepdim=True) + NORM_EPSILON**2).sqrt()


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def pool_words(tokens: Tensor, word_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Average the pieces of each word.

    Args:
        tokens: token features, (B, T, D).
        word_ids: word of each token, -1 for none, (B, T) int64.

    Returns:
        Word features (B, W, D), and True at words (B, W); W is T, so that no shape depends on the
        captions.

    Example:
        >>> words, is_word = pool_words(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0, 0]]))
        >>> words.tolist(), is_word.tolist()
        ([[[2.0], [0.0]]], [[True, False]])
    """
    number = torch.arange(word_ids.shape[1], device=word_ids.device)
    member = (word_ids[:, None, :] == number[:, None]).float()  # (B, W, T)
    count = member.sum(dim=2)
    return _matmul(member, tokens.float()) / count.clamp(min=1)[..., None], count > 0


def sample_word_mask(
    word_ids: Tensor, *, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Choose whole words to mask: a share drawn per caption, rounded, at least one word each.

    Args:
        word_ids: word of each token, -1 for none, (B, T) int64.
        ratio: lowest and highest share of words, each in [0, 1].
        generator: CPU generator of the draws.

    Returns:
        True at every piece of a masked word, (B, T) bool.

    Example:
        >>> ids = torch.tensor([[-1, 0, 0, 1, -1]])
        >>> one = torch.Generator().manual_seed(0)
        >>> int(sample_word_mask(ids, ratio=(1.0, 1.0), generator=one).sum())
        3
    """
    batch, length = word_ids.shape
    low, high = ratio
    draws = torch.rand(batch, length + 1, generator=generator).to(word_ids.device)
    number = word_ids.amax(dim=1, keepdim=True) + 1
    masked = ((low + (high - low) * draws[:, :1]) * number).round().clamp(min=1).minimum(number)
    order = draws[:, 1:].masked_fill(torch.arange(length, device=number.device) >= number, 2.0)
    is_masked = order.argsort(dim=1).argsort(dim=1) < masked
    return is_masked.gather(1, word_ids.clamp(min=0)) & (word_ids >= 0)


def sample_token_mask(
    attention_mask: Tensor, word_ids: Tensor, *, ratio: float, generator: torch.Generator
) -> Tensor:
    """Mask each token with the same probability, as the released code does; words may be split.

    Args:
        attention_mask: True at start, words and end, (B, T) bool.
        word_ids: -1 at start and end, (B, T) int64.
        ratio: probability in [0, 1].
        generator: CPU generator of the draws.

    Returns:
        (B, T) bool; False at start, end and padding.
    """
    draws = torch.rand(attention_mask.shape, generator=generator).to(attention_mask.device)
    return (draws < ratio) & attention_mask & (word_ids >= 0)


def sample_truncated_ratio(
    *, mean: float, deviation: float, low: float, high: float, generator: torch.Generator
) -> float:
    """Draw from a normal distribution truncated to [low, high] (MAGE; one draw per batch there).

    By the inverse CDF of one uniform number, so that all versions of torch draw the same.
    """
    normal = NormalDist(mean, deviation)
    start, end = normal.cdf(low), normal.cdf(high)
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(max(normal.inv_cdf(start + (end - start) * uniform), low), high)


def batch_perplexity(counts: Tensor) -> Tensor:
    """Return exp of the entropy of counts (K,): the effective number of codes.

    Example:
        >>> batch_perplexity(torch.tensor([5.0, 5.0, 0.0]))
        tensor(2.)
    """
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


def join_levels(levels: Mapping[str, Codes]) -> Codes:
    """Return the codes of several quantizers as one grid, (B, N, C1 + C2 + ...).

    Coarse levels are upsampled (nearest) to the finest grid, as VQ-VAE-2's decoder sees them.

    Example:
        >>> top = Codes(torch.ones(1, 1, 2), None, (1, 1))
        >>> bottom = Codes(torch.zeros(1, 4, 3), None, (2, 2))
        >>> join_levels({"top": top, "bottom": bottom}).codes.shape
        torch.Size([1, 4, 5])
    """
    grid = max((each.grid for each in levels.values()), key=lambda grid: grid[0] * grid[1])
    rows = [
        F.interpolate(each.codes.mT.unflatten(2, each.grid), size=grid).flatten(2).mT
        if each.grid != grid
        else each.codes
        for each in levels.values()
    ]
    return Codes(torch.cat(rows, dim=2), None, grid, levels=dict(levels))


def word_semantic_loss(
    tokens: Tensor,
    words: Tensor,
    word_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    same: Tensor | None = None,
) -> Tensor:
    """InfoNCE between images and captions, compared word by patch.

    A caption's score for an image is the mean, over its words, of the cosine with the word's best
    patch (late interaction, Yao et al. 2022): Eq. 5 at the level of words, as in TA-VQ
    (arXiv 2503.01261).

    Args:
        tokens: the code-ViT's patch tokens, (B, N, D).
        words: text features, (B, W, D); a target, so no gradient flows into it.
        word_mask: True at words, (B, W) bool; a caption without words scores 0 everywhere.
        temperature, symmetric, same: see :func:`global_semantic_loss`.

    Returns:
        Scalar, the mean over the batch; 0 with a gradient path for an empty batch.

    Example:
        >>> eye = torch.eye(2)[:, None]  # one patch and one word each
        >>> word_semantic_loss(eye, eye, torch.ones(2, 1, dtype=torch.bool))
        tensor(0.3133)
    """
    if len(tokens) == 0:
        return (tokens.float() / temperature).sum()
    each = cosines(words.detach().flatten(0, 1), tokens.flatten(0, 1))  # (B * W, B * N)
    best = each.unflatten(1, tokens.shape[:2]).amax(dim=-1).unflatten(0, words.shape[:2])
    is_word = word_mask[..., None].to(best.dtype)
    scores = (best * is_word).sum(dim=1) / is_word.sum(dim=1).clamp(min=1)  # (captions, images)
    loss = contrast(scores.mT, temperature, same)
    return (loss + contrast(scores, temperature, same)) / 2 if symmetric else loss


def caption_relationship_loss(sentences: Tensor, codes: Tensor) -> Tensor:
    """Mean squared gap between caption-caption and image-image cosines: Eq. 8 for captions.

    Args:
        sentences: caption features, (B, Ds); a target, so no gradient flows into it.
        codes: code vectors, projected or raw, (B, N, E); averaged per image.

    Returns:
        Scalar, the mean over pairs of distinct images; 0 with a gradient path for fewer than two.

    Example:
        >>> eye = torch.eye(2)
        >>> round(float(caption_relationship_loss(eye, torch.ones(2, 1, 3))), 4)  # cosines 0 and 1
        1.0
    """
    means, sentences = codes.float().mean(dim=1), sentences.detach()
    gap = cosines(means, means) - cosines(sentences, sentences)
    count = len(gap)
    return gap.square().fill_diagonal_(0.0).sum() / max(1, count * (count - 1))


def pool_phrases(words: Tensor, is_word: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Average each run of `span` words; a caption of fewer words is one phrase.

    Args:
        words: (B, W, D), zeros where `is_word` is False.
        is_word: True at the first words of each row, (B, W) bool.
        span: words per phrase, >= 1.

    Returns:
        Features (B, W, D) of the phrase that starts at each word, and where there is one (B, W).

    Example:
        >>> pool_phrases(torch.tensor([[[1.0], [3.0], [0.0]]]), torch.tensor([[1, 1, 0]]) > 0, 2)
        (tensor([[[2.0000],
                 [1.5000],
                 [0.0000]]]), tensor([[ True, False, False]]))
    """
    count = is_word.sum(dim=1, keepdim=True)
    padded = F.pad(words, (0, 0, 0, span - 1))
    runs = padded.unfold(1, span, 1).sum(dim=-1)
    runs = runs / count.clamp(min=1, max=span)[..., None]
    number = torch.arange(words.shape[1], device=words.device)
    return runs, is_word & (number < (count - span + 1).clamp(min=1))


def all_finite(tensors: Sequence[Tensor], *, limit: float = math.inf) -> Tensor:
    """Return a boolean scalar on the tensors' device: whether all floating values are finite.

    With a `limit`, absolute values above it count as infinite.

    Example:
        >>> all_finite([torch.zeros(3), torch.tensor([1.0, torch.inf])])
        tensor(False)
    """
    dense = [t.coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    floating = [t for t in dense if t.is_floating_point() and t.numel()]
    largest = get_total_norm(floating, norm_type=float("inf"))
    return largest.isfinite() & (largest <= limit)


def drop_gradients(module: nn.Module) -> None:
    """Set the gradients of a module's parameters to None."""
    for parameter in module.parameters():
        parameter.grad = None


def nonfinite_gradients(module: nn.Module, among: Iterable[nn.Parameter]) -> str:
    """Say which of the parameters `among` those of `module` have a bad gradient, by part."""
    held = {id(p) for p in among}
    bad = {
        name: p.grad
        for name, p in module.named_parameters()
        if id(p) in held and p.grad is not None and not all_finite([p.grad], limit=LARGEST_GRADIENT)
    }
    if not bad:
        return "not finite on another process"
    what = f"above {LARGEST_GRADIENT:.0e}" if all_finite([*bad.values()]) else "not finite"
    return f"{what} in {in_groups([*bad])}"


def in_groups(names: Sequence[str]) -> str:
    """Summarize parameters' names by the part of the host that they belong to.

    >>> in_groups(["encoder.a", "encoder.b", "loss.lgvq.c", "loss.discriminator.d"])
    'encoder (encoder.a and 1 more), heads (loss.lgvq.c), discriminator (loss.discriminator.d)'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        label = parts[1] if parts[0] == "loss" and len(parts) > 2 else parts[0]
        groups.setdefault("heads" if label == "lgvq" else label, []).append(name)
    return ", ".join(
        f"{label} ({found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''})"
        for label, found in groups.items()
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator inside the context and restore it after; GPUs' are not touched.

    `torch.manual_seed` would seed the GPUs' too, which `fork_rng(devices=[])` does not restore.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(3)
        >>> with seeded(0):
        ...     bool(torch.equal(first, torch.rand(3)))
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the rows of all ranks, (B, ...) -> (sum of B, ...); differentiable.

    Ranks may differ in B, which the tensors share. Every rank must call it, also one without rows,
    and where the rows need a gradient every rank must run backward through the result. A loss of
    the result that is the same on all ranks has, after DDP's mean over ranks, the gradient of one
    process with all rows.

    Example:
        >>> (rows,) = gather_rows(torch.ones(2, 3))
        >>> rows.shape
        torch.Size([2, 3])
    """
    if world_size() == 1:
        return tensors
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    return tuple(_GatherRows.apply(rows, sizes) for rows in tensors)


class _GatherRows(torch.autograd.Function):
    """All-gather; backward sums the gradients of all ranks (every backend has all-reduce)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        start = sum(sizes[: dist.get_rank()])
        ctx.own = slice(start, start + len(rows))
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None


def cosine_margin_loss(codes: Tensor, features: Tensor, *, margin: float) -> Tensor:
    """Hinge on the cosine of each code with its feature, relu(1 - margin - cos(z_i, f_i)).

    The marginal cosine similarity loss of VA-VAE (arXiv 2501.01423, Eq. 4).

    Args:
        codes: (B, N, D).
        features: (B, N, D); a target, so no gradient flows into it.
        margin: m1; a cosine of at least 1 - m1 costs nothing.

    Returns:
        Scalar, the mean over all positions; 0 with a gradient path for an empty batch.

    Example:
        >>> code, feature = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> cosine_margin_loss(code, feature, margin=0.25)
        tensor(0.7500)
    """
    each = (1 - margin - paired_cosines(codes, features.detach())).relu()
    return each.sum() / max(1, each.numel())


def paired_cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of each vector with its partner, (..., D) and (..., D) -> (...) float32.

    Example:
        >>> paired_cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([1.])
    """
    return (_unit(left.float()) * _unit(right.float())).sum(dim=-1)


def distance_matrix_loss(codes: Tensor, features: Tensor, *, margin: float) -> Tensor:
    """Hinge on pairs' similarities, relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    The marginal distance matrix similarity loss of VA-VAE (arXiv 2501.01423, Eq. 5).

    Args:
        codes: (B, N, C).
        features: (B, N, D) of the same positions; a target, so no gradient flows into it.
        margin: m2; a difference of at most m2 costs nothing.

    Returns:
        Scalar, the mean over the N x N pairs of each image; 0 with a gradient path for an empty
        batch.

    Example:
        >>> codes, features = torch.ones(1, 2, 3), torch.eye(2)[None]  # cosines 1 and 0
        >>> distance_matrix_loss(codes, features, margin=0.25)  # of the pairs (0, 1) and (1, 0)
        tensor(0.3750)
    """
    features = features.detach()
    gap = cosines(codes, codes) - cosines(features, features)
    each = (gap.abs() - margin).relu()
    return each.sum() / max(1, each.numel())


def resize_features(features: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize features (B, M, D) on a grid to (B, N, D), bilinearly; coarser grids average.

    Example:
        >>> resize_features(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), (2, 2), (1, 1))
        tensor([[[1.5000]]])
    """
    if old == new:
        return features
    plane = features.mT.unflatten(2, old)
    plane = F.interpolate(plane, size=new, mode="bilinear", antialias=True, align_corners=False)
    return plane.flatten(2).mT
