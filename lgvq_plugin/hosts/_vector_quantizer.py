"""Vector quantization (Eq. 1 and 2) with an EMA or a gradient codebook and dead-code restart.

z (B, C, H, W) --nearest code--> z_q --straight-through--> decoder
        |____ counts and sums per code ____> EMA codebook, restart of dead codes

Ours rather than vector-quantize-pytorch: that one returns (z_q, indices, loss), needs einops,
einx, loguru and torch-einops-utils, and restarts codes from torch's global random stream.
"""

from typing import Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import batch_perplexity
from ..sockets import ConfigError, suggest

MODES = ("ema", "gradient")
GRACE = 2.0  # a restarted code has this many times the threshold: 70 steps to find users at .99
EPSILON = 1e-5  # Laplace smoothing of the counts


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest code.

    In mode "gradient" the loss is Eq. 2 without its first term, codebook + commitment * encoder
    term; in mode "ema" it is commitment * encoder term, and the codes are moving averages of the
    vectors assigned to them. The codebook changes in training with gradients enabled only.

    Args:
        n_embed: K, the number of codes.
        embed_dim: C, the width of a code.
        mode: how the codebook learns.
        decay: of the moving averages.
        commitment: omega of Eq. 2.
        restart_dead: draw dead codes again from the batch's vectors; the first training batch
            draws the whole codebook so.
        dead_threshold: a code is dead when its average count falls below this share of the
            mean count, and the batch does not use it.
        seed: of the draws; they follow from (seed, step), so that a resumed run draws the same.

    Attributes:
        embedding: `embedding.weight` (K, C); without gradient in mode "ema".
        cluster_size: moving average of the counts, (K,) float32.
        embed_avg: moving average of the sums, (K, C) float32; mode "ema" only.
        steps: updates so far, int64 scalar.
    """

    layout = "channels_first"  # of what it takes and returns, (B, C, h, w)
    cluster_size: Tensor
    embed_avg: Tensor
    steps: Tensor

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        *,
        mode: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_dead: bool = True,
        dead_threshold: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"quantizer: no mode {mode!r}{suggest(mode, list(MODES))}")
        for name, value in (("decay", decay), ("dead_threshold", dead_threshold)):
            if not 0 <= value < 1:
                raise ConfigError(f"quantizer: {name} must lie in [0, 1), got {value!r}")
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.mode, self.decay, self.commitment = mode, decay, commitment
        self.restart_dead, self.dead_threshold, self.seed = restart_dead, dead_threshold, seed
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        self.register_buffer("cluster_size", torch.ones(n_embed))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if mode == "ema":
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("embed_avg", self.embedding.weight.detach().clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantize (B, C, H, W).

        Returns:
            z_q (B, C, H, W) float32, whose gradient goes straight to `z`; the loss, a scalar;
            and (perplexity of the batch, None, indices (B * H * W,) int64).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            vectors = z.movedim(1, -1).reshape(-1, self.embed_dim)
            indices = nearest_codes(vectors.detach(), self.embedding.weight.detach())
            z_q = self.embed_code(indices.view(z.shape[0], *z.shape[2:]))
            loss = self.commitment * F.mse_loss(z, z_q.detach())
            if self.mode == "gradient":
                loss = loss + F.mse_loss(z_q, z.detach())
            counts = _sum_by_code(torch.ones_like(vectors[:, :1]), indices, self.n_embed)[:, 0]
            if self.training and torch.is_grad_enabled():
                # Below, the codebook changes in place; the graph holds no view of it.
                self._update(vectors.detach(), indices)
            # z - z.detach() is exactly 0: decoding the indices later gives the very same image.
            return z_q.detach() + (z - z.detach()), loss, (batch_perplexity(counts), None, indices)

    def embed_code(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, H, W) of indices (B, H, W)."""
        return F.embedding(indices, self.embedding.weight).movedim(-1, 1)

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        """Move averages and codes by the statistics of one batch, summed over all ranks."""
        finite = vectors.isfinite().all(dim=1, keepdim=True)  # an overflow must not stay forever
        vectors = vectors.where(finite, 0.0)
        counts = _all_sum(_sum_by_code(finite.float(), indices, self.n_embed)[:, 0])
        self.cluster_size.lerp_(counts, 1 - self.decay)
        if self.mode == "ema":
            sums = _all_sum(_sum_by_code(vectors, indices, self.n_embed))
            self.embed_avg.lerp_(sums, 1 - self.decay)
            total = self.cluster_size.sum()
            smooth = (self.cluster_size + EPSILON) / (total + self.n_embed * EPSILON) * total
            self.embedding.weight.copy_(self.embed_avg / smooth[:, None])
        if self.restart_dead:
            self._restart(vectors, finite[:, 0], counts)
        self.steps += 1

    def _restart(self, vectors: Tensor, finite: Tensor, counts: Tensor) -> None:
        """Put dead codes where vectors of this batch lie; no synchronization with a GPU."""
        size = self.dead_threshold * counts.mean()
        is_dead = ((self.cluster_size < size) & (counts == 0)) | (self.steps == 0)
        keys = _scrambled(vectors.shape[0], self.seed, self.steps).masked_fill(~finite, 2**62)
        order = keys.argsort()  # distinct vectors as long as there are enough
        places = torch.arange(self.n_embed, device=order.device) % vectors.shape[0]
        fresh = _from_first_rank(vectors[order[places]])
        weight = self.embedding.weight
        weight.copy_(fresh.where(is_dead[:, None], weight))
        self.cluster_size.copy_((GRACE * size).where(is_dead, self.cluster_size))
        if self.mode == "ema":
            average = fresh * self.cluster_size[:, None]
            self.embed_avg.copy_(average.where(is_dead[:, None], self.embed_avg))


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return argmin_k ||vectors_i - codebook_k|| (Eq. 1): (M, C) and (K, C) to (M,) int64.

    Example:
        >>> nearest_codes(torch.tensor([[0.9], [-2.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    squares = codebook.square().sum(dim=1)  # ||v||^2 is the same for all codes
    return torch.addmm(squares, vectors, codebook.mT, alpha=-2).argmin(dim=1)


def _sum_by_code(rows: Tensor, indices: Tensor, n_embed: int) -> Tensor:
    """Sum rows (M, D) by index to (K, D), without an M x K matrix."""
    return rows.new_zeros(n_embed, rows.shape[1]).index_add_(0, indices, rows)


def _scrambled(count: int, seed: int, step: Tensor) -> Tensor:
    """Return (count,) int64 >= 0 that look random and follow from (seed, step) on any device."""
    x = torch.arange(1, count + 1, device=step.device) + step * 1_000_003 + seed * 998_244_353
    for factor in (0x45D9F3B3335B369, 0x3335B36945D9F3B):  # integer hash; products wrap
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * factor
    return (x ^ (x >> 29)) & (2**62 - 1)


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _all_sum(x: Tensor) -> Tensor:
    if _has_ranks():
        torch.distributed.all_reduce(x)
    return x


def _from_first_rank(x: Tensor) -> Tensor:
    if _has_ranks():
        torch.distributed.broadcast(x, src=0)
    return x
