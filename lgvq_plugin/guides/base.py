"""The contract of a text guide: captions in, frozen features out."""

import hashlib
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import sample_word_mask
from ..sockets import ConfigError, resolve, suggest
from ..types import TextFeatures, TextTokens

logger = logging.getLogger(__name__)

PLACES = ("device", "cache_dir")  # parameters that change no feature


@dataclass(frozen=True)
class UnknownWords:
    """How many words of some captions a guide does not know.

    Args:
        words: number of words, repeated ones counted each time.
        unknown: number of words with a part that the guide was never trained on.
        examples: the most frequent unknown words, at most three.
    """

    words: int
    unknown: int
    examples: tuple[str, ...]


class AbstractGuide(ABC):
    """A frozen text model, held outside the host's module tree.

    It is not an `nn.Module`, so it never enters a checkpoint, an EMA copy or a DDP bucket. Copies
    share one network, and pickling stores how to build the guide, not its weights.

    Attributes:
        max_length: captions are cut to this many tokens, start and end included.
        token_dim: Dt, width of `TextFeatures.tokens` and of `vocabulary`.
        sentence_dim: Ds, width of `TextFeatures.sentence`.
        pad_id: token id of padding.
        truncated: number of different captions cut since the guide was built.
        keeps_features: features are in memory or on disk already.
    """

    max_length: int
    token_dim: int
    sentence_dim: int
    pad_id: int = 0
    truncated: int = 0
    keeps_features: bool = False

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; long ones are cut, their end token kept.

        `cut` of the result counts them, for the text cache and `lgvq data check`.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions under `no_grad`, in float32, on :attr:`device`.

        The result may be trimmed to T tokens, the longest of the B captions.

        Args:
            captions: B strings; an empty one gives start and end tokens only.
            token_mask: tokens to mask, (B, max_length) bool; no feature depends on the masked
                words, and `token_ids` of the result still holds them.
        """

    def encode_apart(self, captions: Sequence[str]) -> TextFeatures:
        """Encode B captions so that the features of one do not depend on the others, if it can."""
        return self.encode(captions)

    def draw_mask(
        self,
        captions: Sequence[str],
        word_ids: Tensor,
        *,
        ratio: tuple[float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw which words of B captions to mask, as a `token_mask` for :meth:`encode`.

        A guide that reads its features from disk draws one of the stored masks.

        Args:
            captions: B strings.
            word_ids: the word of each token, -1 for none, (B, max_length) int64.
            ratio: lowest and highest share of words, each in [0, 1].
            generator: CPU generator.

        Returns:
            True at every piece of a masked word, (B, max_length) bool.
        """
        return sample_word_mask(word_ids, ratio=ratio, generator=generator)

    @property
    @abstractmethod
    def vocabulary(self) -> Tensor:
        """Token embedding, (V, Dt), on :attr:`device`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the network."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "AbstractGuide":
        """Move the network; returns self."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""

    def count_truncated(self, captions: Iterable[str]) -> None:
        """Count captions that were cut, each once; the first one is logged."""
        known: set[str] = self.__dict__.setdefault("_truncated", set())
        new = {*captions} - known
        if new and not known:
            logger.warning(
                "a caption has more than max_length = %d tokens and is cut, its end token kept; "
                "the guide's `truncated` counts such captions",
                self.max_length,
            )
        known |= new
        self.truncated += len(new)

    def unknown_words(self, captions: Sequence[str]) -> "UnknownWords | None":
        """Count the words that the guide has never seen; None for guides that cannot tell."""
        return None

    def weights(self) -> Mapping[str, Tensor]:
        """Return all tensors that features are computed from."""
        return {"vocabulary": self.vocabulary}

    @property
    def fingerprint(self) -> str:
        """Sha256 of weights and config; guides with equal fingerprints give equal features.

        It is computed once, from all weights. A cache of features is keyed by it.
        """
        known = self.__dict__.get("_fingerprint")
        if known is None:
            known = self._fingerprint = self._digest()
        return known

    def _digest(self) -> str:
        config = {key: value for key, value in self.config.items() if key not in PLACES}
        facts = {"class": type(self).__qualname__, "max_length": self.max_length, "config": config}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AbstractGuide":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.config)


def _rebuild(cls: type, config: dict[str, Any]) -> AbstractGuide:
    return cls(**config)


def build_guide(config: Mapping[str, Any]) -> AbstractGuide:
    """Build `{"use": name or dotted path, ...}`; the other keys go to the constructor.

    Args:
        config: the `lgvq.guide` block; `use` defaults to open_clip.

    Raises:
        ConfigError: for an unknown member, an unknown key (the nearest one is named), a missing
            key, and for values that the member rejects.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"lgvq.guide: expected a mapping such as {{use: open_clip}}: {config!r}")
    params = {str(key): value for key, value in config.items()}
    name = params.pop("use", "open_clip")
    member = resolve("guides", name)
    try:
        known = inspect.signature(member).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lgvq.guide.use: {name!r} is no guide: {error}") from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in params:
        if key not in known and not takes_all:
            hint = suggest(key, ["use", *known])
            raise ConfigError(f"unknown key lgvq.guide.{key} of guide {name!r}{hint}")
    for key, parameter in known.items():
        is_variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not is_variable and key not in params:
            raise ConfigError(f"lgvq.guide: guide {name!r} needs the key {key!r}")
    guide = member(**params)
    if not isinstance(guide, AbstractGuide):
        raise ConfigError(f"lgvq.guide.use: {name!r} gave a {type(guide).__name__}, no guide")
    return guide
