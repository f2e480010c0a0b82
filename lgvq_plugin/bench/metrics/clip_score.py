"""CLIP score of pictures and texts: 100 times the cosine of their CLIP features, 0 if negative.

Written here because torchmetrics' own (1.9) fails with transformers 5.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sockets import ConfigError
from .reconstruction import eight_bit

BATCH = 32


class CLIPScorer:
    """Score pictures by how well a CLIP of transformers finds that texts fit them.

    Args:
        model: a folder with its weights, or a name on the hub.

    Raises:
        ConfigError: if transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        network, self._processor = _load(model)
        self._network = network.float().eval()
        self.settings = {"implementation": "100 max(cosine, 0)", "model": model}

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the CLIP score of each pair, (M,) float32 in [0, 100] (Hessel et al. 2021).

        Args:
            images: (M, 3, H, W) in [-1, 1]; they are seen in 8 bits.
            captions: M texts; too long ones are cut.
        """
        network = self._network.to(images.device)
        shown = (255 * eight_bit(images)).round().to(torch.uint8).cpu()
        parts = []
        for begin in range(0, len(shown), BATCH):
            part = slice(begin, begin + BATCH)
            given = self._processor(
                text=list(captions[part]),
                images=list(shown[part]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            seen = network(**given.to(images.device))
            parts.append(F.cosine_similarity(seen.image_embeds, seen.text_embeds).cpu())
        return 100 * torch.cat(parts).clamp(min=0)


def _load(model: str) -> tuple[Any, Any]:
    try:
        import transformers

        network = transformers.CLIPModel.from_pretrained(model)
        return network, transformers.CLIPProcessor.from_pretrained(model)
    except ImportError as error:
        raise ConfigError(f"CLIP score: {error}; pip install 'lgvq_plugin[hf]'") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"evaluation.clip_score: no CLIP model at {model!r} ({str(error).splitlines()[0]}); "
            "expected a folder with weights of transformers, or a name on the hub"
        ) from error
