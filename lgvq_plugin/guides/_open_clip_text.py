"""What the guides on open_clip's text tower share; they differ in where the tower comes from."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ..sockets import ConfigError
from ._token_guide import AbstractTokenGuide
from ._words import Row, number_words


class OpenCLIPText(AbstractTokenGuide):
    """open_clip's own text tower, frozen, in float32, with one more row in its vocabulary.

    That row stands for hidden words. CLIP has no mask token, so it is the mean of all token
    embeddings: no word in particular, of no unusual size, and the same whatever stood there. As
    hidden words are replaced before the first layer, nothing of them reaches any feature. The
    caption is pooled where its end token stands, whatever the ids before it.

    A causal tower never looks ahead: it sees `max_length` tokens only, exactly as if it saw its
    whole context. Others see the whole context, and the result is cut.

    The same batch gives the same bits. The same caption among other captions may differ in the
    last bits (1e-5), since matrix products are split up by batch size.

    Args:
        tower: text tower, owned and changed by the guide.
        tokenizer: byte-pair tokenizer of the tower.
        max_length: tokens a caption is cut to, start and end included.
        device: where the tower goes; the CPU if not given.

    Raises:
        ConfigError: if max_length is no int from 3 to the tower's context, or the tower or the
            tokenizer is of another kind.
    """

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Any,
        *,
        max_length: int,
        device: torch.device | str | None,
    ) -> None:
        if not isinstance(tower, TextTransformer) or not isinstance(tokenizer, SimpleTokenizer):
            raise ConfigError(
                f"guide: the model's text tower is a {type(tower).__name__} with a "
                f"{type(tokenizer).__name__}; expected open_clip's TextTransformer with its "
                "SimpleTokenizer. guide: {use: huggingface, model: ...} takes other encoders"
            )
        context = tower.context_length
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise ConfigError(f"guide.max_length: expected an int, got {max_length!r}")
        if not 3 <= max_length <= context:
            raise ConfigError(
                f"guide.max_length: expected 3 to {context}, the model's context; got {max_length}"
            )
        self.max_length, self._tokenizer = max_length, tokenizer
        is_causal = tower.attn_mask is not None and tower.cls_emb is None
        self._span = max_length if is_causal and tower.pool_type in ("argmax", "eos") else context
        self._words = self._hidden = tower.vocab_size
        self._tower = _prepare(tower, end=tokenizer.eot_token_id, span=self._span)
        self._pad = self._tower.pad_id
        self.token_dim, self.sentence_dim = tower.width, _output_width(tower)
        self.to("cpu" if device is None else device)

    @property
    def vocabulary(self) -> Tensor:
        """The token embedding, (V, Dt), on :attr:`device`."""
        return self._tower.token_embedding.weight[: self._words]

    @property
    def device(self) -> torch.device:
        """Where the tower lies."""
        return self._tower.token_embedding.weight.device

    def to(self, device: torch.device | str) -> "OpenCLIPText":
        """Move the tower; returns self."""
        self._tower.to(device)
        return self

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the tower's tensors."""
        return self._tower.state_dict()

    def _row(self, caption: str) -> Row:
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        pieces = self._tokenizer.encode(caption)
        ends = [self._tokenizer.decoder[piece].endswith("</w>") for piece in pieces]
        words = number_words(ends)
        # A caption that spells out a special token is no reason to hide or predict it.
        special = self._tokenizer.all_special_ids
        words = [-1 if p in special else w for p, w in zip(pieces, words, strict=True)]
        return [start, *pieces, end], [-1, *words, -1]

    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        ids = nn.functional.pad(ids, (0, self._span - ids.shape[1]), value=self._pad)
        states = self._tower.forward_intermediates(
            ids, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        return states["text_intermediates"][0][:, : self.max_length], states["text_features"]


def _prepare(tower: TextTransformer, *, end: int, span: int) -> TextTransformer:
    """Freeze the tower, add the row for hidden words, pool at `end`, cut to `span` positions."""
    tower = tower.float().eval().requires_grad_(False)
    known = tower.token_embedding.weight
    rows = torch.cat([known, known.mean(dim=0, keepdim=True)])
    tower.token_embedding = nn.Embedding.from_pretrained(rows, freeze=True)
    if tower.pool_type == "argmax":
        # The end token has the largest id but for the new one: name it instead.
        tower.pool_type, tower.eos_id = "eos", end
    if span < tower.context_length:
        tower.attn_mask = tower.attn_mask[:span, :span]
    return tower


def _output_width(tower: TextTransformer) -> int:
    projection = tower.text_projection
    if projection is None:
        return tower.width
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
