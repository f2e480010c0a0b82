"""Any text tower of open_clip as the guide; by default that of CLIP ViT-B/32, as in the paper."""

from typing import Any

import torch

from ..sockets import ConfigError
from ._open_clip_source import load_text
from ._open_clip_text import OpenCLIPText


class OpenCLIPGuide(OpenCLIPText):
    """A text tower of open_clip.

    Args:
        model: name of an open_clip model, `hf-hub:org/name` or `local-dir:/path`.
        pretrained: tag or local file, for a plain model name; None gives random weights, with a
            warning, for benchmarks.
        max_length: tokens a caption is cut to, start and end included; 30 in the paper's code.
        device: where the tower goes; the CPU if not given.
        cache_dir: where downloaded weights lie; Hugging Face's own cache if not given.
        seed: of random weights.

    Raises:
        ConfigError: if the model or its weights cannot be found; the message says where they
            were sought.

    Example:
        >>> guide = OpenCLIPGuide("ViT-S-32-alt", pretrained=None, max_length=8)
        >>> guide.encode(["a red circle"]).tokens.shape, guide.sentence_dim
        (torch.Size([1, 8, 256]), 256)
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        max_length: int = 30,
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, str) or not isinstance(pretrained, str | None):
            raise ConfigError(f"guide: expected names, got {model!r} and {pretrained!r}")
        self._source = {
            "model": model,
            "pretrained": pretrained,
            "cache_dir": cache_dir,
            "seed": seed,
        }
        tower, tokenizer = load_text(model, pretrained, cache_dir=cache_dir, seed=seed)
        super().__init__(tower, tokenizer, max_length=max_length, device=device)

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {**self._source, "max_length": self.max_length, "device": str(self.device)}
