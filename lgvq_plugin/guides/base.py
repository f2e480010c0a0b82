"""The contract of a text guide: captions in, frozen features out."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import sample_word_mask
from ..sockets import ConfigError, resolve, suggest
from ..types import TextFeatures, TextTokens

PLACES = ("device", "cache_dir")  # parameters that say where, and change no feature


@dataclass(frozen=True)
class UnknownWords:
    """How much of some captions a guide does not know.

    Args:
        words: in the captions, repeated ones counted each time.
        unknown: how many of them have a part that the guide was never trained on.
        examples: the most frequent unknown words, three at most.
    """

    words: int
    unknown: int
    examples: tuple[str, ...]


class AbstractGuide(ABC):
    """A frozen text model, held outside the host's module tree.

    It is no `nn.Module`: it never enters a checkpoint, an EMA copy or a DDP bucket. Copies share
    the one network, and pickling stores how to build the guide, not its weights.

    Attributes:
        max_length: captions are cut to this many tokens, start and end included.
        token_dim: Dt, width of `TextFeatures.tokens` and of `vocabulary`.
        sentence_dim: Ds, width of `TextFeatures.sentence`.
        truncated: how many captions were cut since the guide was built.
    """

    max_length: int
    token_dim: int
    sentence_dim: int
    truncated: int = 0

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; too long ones are cut, [EOT] kept.

        `cut` of the result tells how many; the cache and `lgvq data check` go by it.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions under `no_grad`, in float32, on :attr:`device`.

        Args:
            captions: B strings; an empty one gives start and end tokens only.
            token_mask: tokens to hide from the encoder, (B, T) bool; no feature of the result
                depends on what stood there, and `token_ids` still tells it.
        """

    def draw_mask(
        self,
        captions: Sequence[str],
        word_ids: Tensor,
        *,
        ratio: tuple[float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw which words of B captions to hide, as a `token_mask` for :meth:`encode`.

        A guide that has its features from disk draws among the maskings it has.

        Args:
            captions: B strings.
            word_ids: the word of each token, -1 for none, (B, T) int64.
            ratio: lowest and highest share of words, each in [0, 1].
            generator: CPU generator of the draws.

        Returns:
            True at every piece of a hidden word, (B, T) bool.
        """
        return sample_word_mask(word_ids, ratio=ratio, generator=generator)

    @property
    @abstractmethod
    def vocabulary(self) -> Tensor:
        """The token embedding, (V, Dt), on :attr:`device`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network lies."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "AbstractGuide":
        """Move the network; returns self."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""

    def unknown_words(self, captions: Sequence[str]) -> "UnknownWords | None":
        """Count the words of captions that the guide has never seen; None if it cannot tell.

        Guides trained on much text cannot, and need not.
        """
        return None

    def weights(self) -> Mapping[str, Tensor]:
        """Return all tensors that features are computed from; a member names its own."""
        return {"vocabulary": self.vocabulary}

    @property
    def fingerprint(self) -> str:
        """Sha256 over the weights and the config: equal ones give equal features.

        It reads all weights the first time and remembers; a moved guide keeps it. A cache of
        features is keyed by it.
        """
        known = self.__dict__.get("_fingerprint")
        if known is None:
            known = self._fingerprint = _digest(self)
        return known

    def __deepcopy__(self, memo: dict[int, Any]) -> "AbstractGuide":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.config)


def _rebuild(cls: type, config: dict[str, Any]) -> AbstractGuide:
    return cls(**config)


def build_guide(config: Mapping[str, Any]) -> AbstractGuide:
    """Build `{"use": name or dotted path, ...}`; the other keys go to the constructor.

    Args:
        config: the `lgvq.guide` block; `use` is open_clip if not given.

    Raises:
        ConfigError: for a member that does not exist, a key that it does not take (the nearest
            one is named) or lacks, and for whatever the member finds wrong with the values.
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


def _digest(guide: AbstractGuide) -> str:
    config = {key: value for key, value in guide.config.items() if key not in PLACES}
    facts = {"class": type(guide).__qualname__, "max_length": guide.max_length, "config": config}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(guide.weights().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
