"""CLIP score of images and texts: 100 times the cosine of their CLIP features, 0 if negative.

Written here because torchmetrics' version (1.9) fails with transformers 5.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sockets import ConfigError
from .reconstruction import to_uint8

BATCH = 32


class CLIPScorer:
    """Score how well texts describe images, with a CLIP model of transformers.

    `model` is a folder with its weights, or a name on the hub.

    Raises:
        ConfigError: if transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        try:
            import transformers

            self._network = transformers.CLIPModel.from_pretrained(model).float().eval()
            self._processor = transformers.CLIPProcessor.from_pretrained(model)
        except ImportError as error:
            raise ConfigError(f"CLIP score: {error}; pip install 'lgvq_plugin[hf]'") from error
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"evaluation.clip_score: no CLIP model at {model!r} "
                f"({str(error).splitlines()[0]}); expected a folder with weights of transformers, "
                "or a name on the hub"
            ) from error
        self.settings = {"implementation": "100 max(cosine, 0)", "model": model}

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the CLIP score of each pair, (M,) float32 in [0, 100] (Hessel et al. 2021).

        Images (M, 3, H, W) in [-1, 1] are rounded to 8 bits, long captions truncated.
        """
        network = self._network.to(images.device)
        pixels = to_uint8(images).cpu()
        scores = []
        for rows in torch.arange(len(pixels)).split(BATCH):
            texts = [captions[row] for row in rows.tolist()]
            options = {"return_tensors": "pt", "padding": True, "truncation": True}
            inputs = self._processor(text=texts, images=list(pixels[rows]), **options)
            output = network(**inputs.to(images.device))
            scores.append(F.cosine_similarity(output.image_embeds, output.text_embeds).cpu())
        return 100 * torch.cat(scores).clamp(min=0)
