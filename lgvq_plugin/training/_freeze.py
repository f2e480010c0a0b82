"""Parts of a host that keep their weights: for good, or while the heads warm up.

A frozen part is in evaluation mode and its gradients are dropped before an update. It still
takes part in the backward pass, so that what the host computes from gradients (the adaptive
weight of its GAN) is as ever.
"""

from collections.abc import Iterator

from torch import nn

from ..hosts.base import find_quantizers
from ..sockets import ConfigError

PARTS = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
CODEBOOK = "codebook"
HEADS = "loss.lgvq."


class Freeze:
    """What of a host is frozen at a step.

    Args:
        host: with attributes `encoder`, `decoder` and a quantizer, where those are to be frozen.
        parts: some of encoder, decoder, codebook.
        heads_first: while the step is below it, everything but our heads is frozen.

    Attributes:
        heads: ids of the heads' parameters.

    Raises:
        ConfigError: if the host lacks a part, or has no heads to train first.
    """

    def __init__(self, host: nn.Module, parts: tuple[str, ...], heads_first: int):
        self.heads_first = heads_first
        heads = [p for name, p in host.named_parameters() if name.startswith(HEADS)]
        if heads_first and not heads:
            raise ConfigError(
                f"training.heads_first: {heads_first}, but {type(host).__name__} has no heads of "
                "LG-VQ; give it a loss of lgvq_plugin, or leave the key out"
            )
        self._for_good = [module for part in parts for module in _modules(host, part)]
        self._first = [module for name, module in host.named_children() if name != "loss"]
        discriminator = getattr(getattr(host, "loss", None), "discriminator", None)
        self._first += [discriminator] if isinstance(discriminator, nn.Module) else []
        self.heads = {id(p) for p in heads}
        self._others = [p for p in host.parameters() if id(p) not in self.heads]

    def trains_heads_only(self, step: int) -> bool:
        """Whether at `step` nothing but the heads learns."""
        return step < self.heads_first

    def quiet(self, step: int) -> None:
        """Put what is frozen at `step` into evaluation mode, the rest of the host's parts back."""
        if self.heads_first:
            for module in self._first:
                module.train(not self.trains_heads_only(step))
        for module in self._for_good:
            module.eval()

    def drop_gradients(self, step: int) -> None:
        """Forget the gradients of what is frozen at `step`."""
        for parameter in self._frozen(step):
            parameter.grad = None

    def _frozen(self, step: int) -> Iterator[nn.Parameter]:
        if self.trains_heads_only(step):
            yield from self._others
            return
        for module in self._for_good:
            yield from module.parameters()


def _modules(host: nn.Module, part: str) -> list[nn.Module]:
    children = dict(host.named_children())
    if part == CODEBOOK:
        known = getattr(getattr(host, "loss", None), "quantizer_path", None)
        return [*find_quantizers(host, known).values()]
    modules = [children[name] for name in PARTS[part] if name in children]
    if not modules:
        raise ConfigError(
            f"training.freeze: {type(host).__name__} has no {part!r}; it has {sorted(children)}"
        )
    return modules
