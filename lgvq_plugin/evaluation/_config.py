"""The `evaluation:` block of a config, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._fields import build, require, to_plain
from ..sockets import ConfigError, resolve, suggest

NAMES = (  # of the metrics, in the order of the table; base.METRICS says what computes them
    *("psnr", "ssim", "lpips", "fid", "fd", "usage", "words", "relation"),
    *("retrieval", "masked_words", "attributes", "caption", "vqa", "t2i"),
)
DEFAULT = ("psnr", "ssim", "usage", "retrieval")
PROBES = {  # key of `evaluation:` and name of the metric -> member of probes that is trained
    "masked_words": "masked_words",
    "caption": "captioning",
    "vqa": "questions",
    "t2i": "text_to_image",
}


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """LPIPS."""

    net: str = "alex"
    """alex (reported by papers), vgg (trained on) or squeeze."""
    backbone: str | None = None
    """File with torchvision's weights of that net; null: torchvision's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FIDConfig:
    """FID, in Inception only."""

    weights: str | None = None
    """weights-inception-2015-12-05-6726825d.pth; null: torch-fidelity's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FDConfig:
    """Frechet distance in another feature net, called `fd_<net>`."""

    net: str = "squeeze"
    """alex, vgg, squeeze, or "pkg.module:factory" of a net from uint8 images to features."""
    weights: str | None = None
    """File of its weights; null: the net's own cache or download."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `evaluation:` may hold; everything has a default."""

    guide: dict[str, Any] | None = None
    """Text guide of the tasks with text; null: that of `lgvq:` in the config, else micro_clip."""
    limit: int | None = None
    """Test images, the first ones; null: all."""
    train_limit: int | None = None
    """Training images of the probes, the first ones; null: all, or four times `limit`."""
    batch_size: int = 32
    """Images the host sees at a time."""
    num_workers: int = 0
    """Processes that load samples."""
    seed: int = 0
    """Of every draw; equal seeds mask equal words and shuffle equally, whatever the host."""
    few_shot: int = 64
    """Training images of the few-shot attribute probe, >= 10."""
    few_shot_draws: int = 1
    """Sets of so many images, >= 1, the first then draws; results are means over them."""
    attribute_words: int = 0
    """Attributes of a data set without labels: so many of its captions' usual words; 0: none."""
    tokenizer: str = "words"
    """Of captions: words (ours), or ptb as papers use (Java)."""
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    """LPIPS."""
    fid: FIDConfig = field(default_factory=FIDConfig)
    """FID."""
    fd: FDConfig = field(default_factory=FDConfig)
    """Frechet distance in another net."""
    masked_words: dict[str, Any] = field(default_factory=dict)
    """Keys of the masked-word probe."""
    caption: dict[str, Any] = field(default_factory=dict)
    """Keys of the captioning probe."""
    vqa: dict[str, Any] = field(default_factory=dict)
    """Keys of the question probe."""
    wordnet: str | None = None
    """Folder that holds NLTK's corpora/wordnet, for WUPS; null: where NLTK looks."""
    t2i: dict[str, Any] = field(default_factory=dict)
    """Keys of the text-to-image probe."""
    clip_score: str | None = None
    """CLIP of transformers that scores generated images, a folder or a name; null: no score."""

    def __post_init__(self) -> None:
        for name in ("limit", "train_limit"):
            value = getattr(self, name)
            require(value is None or value >= 2, name, "a whole number >= 2, or null", value)
        require(self.batch_size >= 1, "batch_size", "a whole number >= 1", self.batch_size)
        require(self.num_workers >= 0, "num_workers", "a whole number >= 0", self.num_workers)
        require(self.few_shot >= 10, "few_shot", "a whole number >= 10", self.few_shot)
        draws = self.few_shot_draws
        require(draws >= 1, "few_shot_draws", "a whole number >= 1", draws)
        words = self.attribute_words
        require(words >= 0, "attribute_words", "a whole number >= 0", words)
        known = ("words", "ptb")
        require(self.tokenizer in known, "tokenizer", "words or ptb", self.tokenizer)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "EvaluationConfig":
        """Return the block `given` as an object; the keys of the probes are checked, too.

        Raises:
            ConfigError: for an unknown key, a value of another type or out of its range.

        Example:
            >>> EvaluationConfig.of({"lpips": {"net": "vgg"}}).lpips.net
            'vgg'
        """
        config = build(cls, to_plain(given or {}), "evaluation")
        for key in PROBES:
            if getattr(config, key):  # a probe's class needs torch; an empty block, no check
                config.probe(key)
        return config

    def probe(self, key: str) -> tuple[Any, Any]:
        """Return the class of the probe behind a key of :data:`PROBES`, and its config.

        Raises:
            ConfigError: if the block does not suit it.
        """
        member = resolve("probes", PROBES[key])
        given = {"seed": self.seed, **getattr(self, key)}
        return member, build(member.Config, given, f"evaluation.{key}")


def names_of(metrics: Iterable[str] | None) -> list[str]:
    """Check names of metrics; raises ConfigError for one that does not exist.

    Example:
        >>> names_of(["ssim", "psnr", "ssim"])
        ['psnr', 'ssim']
    """
    given = list(DEFAULT if metrics is None else metrics)
    for name in given:
        if name not in NAMES:
            raise ConfigError(f"metrics: no {name!r}{suggest(name, NAMES)}")
    if not given:
        raise ConfigError(f"metrics: none given; known: {', '.join(NAMES)}")
    return [name for name in NAMES if name in given]
