"""The contracts of guides: captions or images in, frozen features out."""

import hashlib
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..functional import sample_word_mask
from ..sockets import ConfigError, as_config_error, require_known, resolve
from ..types import ImageFeatures, TextFeatures, TextTokens

logger = logging.getLogger(__name__)

PLACES = ("device", "cache_dir")  # parameters that change no feature
G = TypeVar("G", bound="AbstractFrozenModel")


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


class AbstractFrozenModel(ABC):
    """A frozen model, held outside the host's module tree.

    It is not an `nn.Module`, so it never enters a checkpoint, an EMA copy or a DDP bucket. Copies
    share one network, and pickling stores how to build the guide, not its weights.
    """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the network."""

    @abstractmethod
    def to(self: G, device: torch.device | str) -> G:
        """Move the network; returns self."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Return all tensors that features are computed from."""

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of weights and config; guides with equal fingerprints give equal features.

        It is computed once, from all weights. A cache of features is keyed by it.
        """
        config = {key: value for key, value in self.config.items() if key not in PLACES}
        facts = {"class": type(self).__qualname__, **self._facts(), "config": config}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _facts(self) -> dict[str, Any]:
        """Return what else features depend on."""
        return {}

    def __deepcopy__(self: G, memo: dict[int, Any]) -> G:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.config)


def _rebuild(cls: type, config: dict[str, Any]) -> AbstractFrozenModel:
    return cls(**config)


class AbstractGuide(AbstractFrozenModel):
    """A frozen text model.

    Attributes:
        max_length: captions are cut to this many tokens, start and end included.
        token_dim: Dt, width of `TextFeatures.tokens` and of `vocabulary`.
        sentence_dim: Ds, width of `TextFeatures.sentence`.
        pad_id: token id of padding.
        truncated: number of different captions cut since the guide was built.
        keeps_features: features are in memory or on disk already.
        depends_on_batch: features of a caption depend on the rest of its batch, beyond rounding.
    """

    max_length: int
    token_dim: int
    sentence_dim: int
    pad_id: int = 0
    truncated: int = 0
    keeps_features: bool = False
    depends_on_batch: bool = False

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

    def _facts(self) -> dict[str, Any]:
        return {"max_length": self.max_length}


class AbstractImageGuide(AbstractFrozenModel):
    """A frozen image tower.

    Attributes:
        feature_dim: Dv, width of the patches' and of the summary's features.
    """

    feature_dim: int

    @abstractmethod
    def encode(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) in [-1, 1] under `no_grad`, in float32, on :attr:`device`.

        Resizing and normalization are the guide's own.
        """


def build_guide(config: Mapping[str, Any]) -> AbstractGuide:
    """Build a text guide of `{"use": name or dotted path, ...}`.

    Args:
        config: the `lgvq.guide` block; `use` defaults to open_clip, the other keys go to the
            constructor.

    Raises:
        ConfigError: for an unknown member, an unknown key (the nearest one is named), a missing
            key, and for values that the member rejects.
    """
    return _build(config, "lgvq.guide", AbstractGuide, example="open_clip", default="open_clip")


def build_image_guide(config: Mapping[str, Any]) -> AbstractImageGuide:
    """Build an image guide of the `lgvq.guides.vision` block; see :func:`build_guide`."""
    return _build(config, "lgvq.guides.vision", AbstractImageGuide, example="timm")


def _build(
    config: Mapping[str, Any], path: str, kind: Any, *, example: str, default: str | None = None
) -> Any:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path}: expected a mapping such as {{use: {example}}}: {config!r}")
    params = {str(key): value for key, value in config.items()}
    name = params.pop("use", default)
    if name is None:
        raise ConfigError(f"{path}.use: name a guide, such as {{use: {example}}}; got {params}")
    member = resolve("guides", name)
    _require_kind(member, kind, f"{path}.use: {name!r}")
    with as_config_error(f"{path}.use: {name!r} is no guide", TypeError, ValueError):
        known = inspect.signature(member).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        problem = f"unknown key {path}.{{}} of guide {name!r}"
        require_known(params, ["use", *known], problem)
    for key, parameter in known.items():
        is_variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not is_variable and key not in params:
            raise ConfigError(f"{path}: guide {name!r} needs the key {key!r}")
    guide = member(**params)
    _require_kind(type(guide), kind, f"{path}.use: {name!r}")
    if not isinstance(guide, kind):
        raise ConfigError(f"{path}.use: {name!r} gave a {type(guide).__name__}, no guide")
    return guide


def _require_kind(member: Any, kind: type, what: str) -> None:
    """Refuse a guide of the other kind, before it loads any weights."""
    others = {
        AbstractGuide: "a text guide; it belongs under lgvq.guide",
        AbstractImageGuide: "an image guide; it belongs under lgvq.guides.vision",
    }
    for other, words in others.items():
        if other is not kind and isinstance(member, type) and issubclass(member, other):
            raise ConfigError(f"{what} is {words}")
