"""Averaged weights of a host, without a copy of its modules (hooks and guides stay single)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the trainable parameters; average += (1 - decay) * gap.

    Buffers and frozen parameters are not averaged: an EMA codebook's counts would be averaged
    twice. :meth:`state_dict` fills them in from the host.

    Args:
        host: whose parameters are followed.
        decay: in (0, 1).
    """

    def __init__(self, host: nn.Module, decay: float):
        self.host, self.decay = host, decay
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in host.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move on by one step."""
        current = dict(self.host.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(current[name].detach(), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict of the host with the averaged weights in it."""
        return {**self.host.state_dict(), **self.weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages out of what :meth:`state_dict` returned."""
        with torch.no_grad():
            for name, average in self.weights.items():
                average.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the host have the averaged weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        current = dict(self.host.named_parameters())
        for name, average in self.weights.items():
            kept = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(kept)
