"""The gradient of our terms at the codes, brought to a share of the host's own.

encoder --> codes --> decoder --> host's loss    gradient h
               |----> heads ----> our terms      gradient g    the encoder gets h + r |h| / |g| g

A weight says how large a term is, not how hard it pulls: at weight .05 the gradient of L_gsa at
the codes grew to 25 to 40 times a small VQ-VAE's own (configs/ablation/routes.yaml). A ratio pulls
equally on any host, at any time.
"""

from typing import Any

import torch
from torch import Tensor

TINY = 1e-20


class GradientBalance:
    """Rescales our gradient at the codes; the heads' own gradients stay as they are.

    Args:
        ratio: length of our gradient in units of the host's, over the whole batch of a process.

    Attributes:
        scale: share of the ratio that holds now, the schedule's, in [0, 1].
        measured: what the ratio was before, at the last backward pass; None before the first.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.scale = ratio, 1.0
        self.measured: Tensor | None = None

    def split(self, vectors: Tensor) -> Tensor:
        """Return the codes for our heads; `vectors` of any shape are what the host goes on with.

        Two passes in a step are balanced each by itself.

        Example:
            >>> codes = torch.ones(2, requires_grad=True)
            >>> vectors = codes * 1
            >>> for_our_heads = GradientBalance(0.5).split(vectors)
            >>> ((vectors * torch.tensor([3.0, 4.0])).sum() + 100 * for_our_heads[0]).backward()
            >>> codes.grad  # the host's (3, 4), and ours along the first axis, half as long
            tensor([5.5000, 4.0000])
        """
        if not vectors.requires_grad:
            return vectors
        ours: list[Tensor] = []

        def mix(host: Tensor) -> Tensor | None:
            return self._mixed(host, ours.pop()) if ours else None

        branch: Tensor = _HoldBack.apply(vectors, ours)
        vectors.register_hook(mix)
        return branch

    def _mixed(self, host: Tensor, ours: Tensor) -> Tensor:
        wanted, given = host.float().norm(), ours.float().norm().clamp(min=TINY)
        self.measured = given / wanted.clamp(min=TINY)
        return host + (ours * (self.ratio * self.scale * wanted / given)).to(host.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "measured": None}


class _HoldBack(torch.autograd.Function):
    """The identity; its gradient goes into a list, and zeros go on, so that the sum has none of it.

    Our heads are built after the host's decoder has run, so autograd is here before the codes.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ours: list[Tensor]) -> Tensor:
        ctx.ours = ours
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.ours.append(gradients[0])
        return torch.zeros_like(gradients[0]), None
