"""Tokenizers whose classes live in a repository or another package, as hosts of `lgvq train`.

their class --build--> their object, keys and all, + taming's protocol + a loss
"""

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..host import encode
from ..quantizer_hook import codebook_of, require_quantizer
from ..sockets import ConfigError, check_call, import_target, instantiate, require_known
from .vqvae import AbstractImageTokenizer, to_plain

CODES = ("count", "width", "factor", "unit_length")


def build(
    build: str,
    lossconfig: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    repository: str | None = None,
    path: str | None = None,
    codes: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build a tokenizer by its own class or function, and give it taming's protocol.

    Args:
        build: dotted path of that class or function.
        lossconfig: `{target, params}` of a loss with taming's signature.
        arguments: keyword arguments of `build`.
        repository: where its code is, for the message when it is not found.
        path: folder of a checkout; None if it can be imported as it is.
        codes: what the codes must be: count, width, factor (pixels per code), unit_length (true if
            they have length 1).
        image_size: side of the images that it was trained on; data sets use it.

    Raises:
        ConfigError: if the code is not found, does not take the arguments, or builds other codes.
    """
    with _on_path(path):
        maker = _find(build, repository, path)
        given = to_plain(arguments or {})
        check_call(build, maker, (), given)
        host = maker(**given)
    for module in host.modules():  # LlamaGen's count of used codes is a parameter, kept as a buffer
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.detach()
    kind = type(host)
    host.__class__ = type(kind.__name__, (TamingProtocol, kind), {"__module__": kind.__module__})
    if codes:
        _check_codes(host, codes)
    host.loss = instantiate(to_plain(lossconfig))
    return host.train()


def _find(build: str, repository: str | None, path: str | None) -> Any:
    try:
        return import_target(build)
    except ConfigError as error:
        if repository is None:
            raise
        looked = f" in {path!r}" if path else ""
        raise ConfigError(
            f"{error}. It is part of {repository}{looked and ', and was not found'}{looked}: clone "
            "it, and give --repo PATH (model.params.path) or set PYTHONPATH"
        ) from error


@contextmanager
def _on_path(path: str | None) -> Any:
    """Import from a checkout first inside the context."""
    if path is None:
        yield
        return
    if not Path(path).is_dir():
        raise ConfigError(f"--repo (model.params.path): no folder {path!r}")
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


class TamingProtocol:
    """What `lgvq train` asks of a host, in front of the class of a tokenizer."""

    image_key = "image"
    learning_rate = 1e-4
    betas = (0.5, 0.9)
    scheduler_config = None
    get_input = AbstractImageTokenizer.get_input
    configure_optimizers = AbstractImageTokenizer.configure_optimizers
    get_last_layer = AbstractImageTokenizer.get_last_layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of x (B, 3, H, W) and the sum of the quantizer's losses."""
        output: Any = super().forward(x)  # type: ignore[misc]
        if hasattr(output, "sample"):  # diffusers
            output = output.sample, output.commit_loss
        images, losses = output[:2]
        terms = losses if isinstance(losses, tuple | list) else [losses]
        zero = images.new_zeros(())  # in evaluation mode LlamaGen's are None
        return images, sum((t.mean() for t in terms if isinstance(t, Tensor)), zero)

    def foreign_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the tokenizer's own class."""
        state = self.state_dict()  # type: ignore[attr-defined]
        return {key: value for key, value in state.items() if not key.startswith("loss.")}


def _check_codes(host: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Compare the codes of a small image with what is published; ConfigError if they differ."""
    require_known(wanted, CODES, "model.params.codes: no key {!r}")
    side = 2 * wanted.get("factor", 16)
    like = next(host.parameters())
    image = torch.linspace(-1, 1, 3 * side * side, dtype=like.dtype).view(1, 3, side, side)
    found = encode(host.eval(), image.to(like.device))
    codebook = codebook_of(require_quantizer(host)[1])
    norms = found.codes.norm(dim=-1)
    is_unit = torch.allclose(norms, torch.ones_like(norms), atol=1e-3)
    built = {
        "count": None if codebook is None else len(codebook),
        "width": found.codes.shape[-1],
        "factor": side // found.grid[0],
        "unit_length": is_unit,
    }
    for key, value in wanted.items():
        if built[key] != value:
            raise ConfigError(
                f"model.params.codes: {key} is {value!r} for this tokenizer, but {built[key]!r} in "
                f"the {type(host).__name__} that was built; another version of its code, or other "
                "model.params.arguments?"
            )
