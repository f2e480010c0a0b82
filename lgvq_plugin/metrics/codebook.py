"""How much of the codebook a set of images uses."""

import torch
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
