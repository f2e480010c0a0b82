"""The `lgvq:` block: frozen dataclasses, checked when built, and the two recipes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from .sockets import ConfigError, suggest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GlobalSemanticConfig:
    """L_gsa, global semantic alignment."""

    weight: float = 1.0e-3
    """Alpha; 0 switches the objective off. Paper's configs: 0.001."""
    temperature: float = 0.07
    """Divides the cosines; the released code has 1."""
    learnable_temperature: bool = True
    """Train the temperature from its start value."""
    symmetric: bool = True
    """Average both directions; the released code has image to text only."""
    gather: bool = True
    """Take negatives from all ranks."""
    exclude_same: bool = True
    """Leave pairs with the very same caption out of the negatives."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "weight", ">= 0", self.weight)
        _require(self.temperature > 0, "temperature", "> 0", self.temperature)


@dataclass(frozen=True, kw_only=True)
class MaskedTextConfig:
    """L_mtp, masked text prediction."""

    weight: float = 1.0e-2
    """Beta; 0 switches the objective off."""
    mask_at: Literal["input", "output"] = "input"
    """Hide words before the text encoder, or (released code, leaks) after it."""
    ratio: tuple[float, float] = (0.15, 0.5)
    """Lowest and highest share of hidden words; at `output` the cut of a normal draw."""
    label_smoothing: float = 0.0
    """0.1 in the released code, none in the paper."""
    attend_padding: bool = False
    """The released code's padding mask masks nothing."""
    depth: int = 2
    """Blocks of the decoder."""
    heads: int = 1
    """Attention heads of the decoder."""
    dropout: float = 0.0
    """In the decoder; 0.1 in the released code."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "weight", ">= 0", self.weight)
        _require(self.mask_at in ("input", "output"), "mask_at", "input|output", self.mask_at)
        low, high = self.ratio
        _require(0 < low <= high <= 1, "ratio", "0 < low <= high <= 1", self.ratio)


@dataclass(frozen=True, kw_only=True)
class RelationshipConfig:
    """L_ras, relationship alignment."""

    weight: float = 1.0e-4
    """Gamma; 0 switches the objective off."""
    variant: Literal["paper", "pairs"] = "pairs"
    """See `functional.relationship_loss`."""
    temperature: float = 0.1
    """Of the soft matching; `pairs` only."""
    project: bool = False
    """Compare codes behind a learned layer, as the released code does, or raw (paper)."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "weight", ">= 0", self.weight)
        _require(self.variant in ("paper", "pairs"), "variant", "paper|pairs", self.variant)
        _require(self.temperature > 0, "temperature", "> 0", self.temperature)


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """The three objectives."""

    global_semantic: GlobalSemanticConfig = field(default_factory=GlobalSemanticConfig)
    """L_gsa."""
    masked_text: MaskedTextConfig = field(default_factory=MaskedTextConfig)
    """L_mtp."""
    relationship: RelationshipConfig = field(default_factory=RelationshipConfig)
    """L_ras."""


@dataclass(frozen=True, kw_only=True)
class CodeViTConfig:
    """The code-ViT."""

    width: int | None = None
    """Of the transformer; the code width if null."""
    depth: int = 2
    """Number of blocks."""
    heads: int = 1
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class LGVQConfig:
    """Everything under `lgvq:`."""

    recipe: Literal["corrected", "paper"] = "corrected"
    """Defaults of all keys below: what the method meant, or the released arithmetic."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """Weights and choices of the three objectives."""
    guide: Mapping[str, Any] = field(default_factory=lambda: {"use": "open_clip"})
    """`use:` names a member of guides or a dotted path; the rest goes to its constructor."""
    code_vit: CodeViTConfig = field(default_factory=CodeViTConfig)
    """The code-ViT."""
    quantizer: str | None = None
    """Path of the host's quantizer; found by name if null."""
    code_dim: int | None = None
    """Width of a code; read off the quantizer if null."""
    grid: tuple[int, int] = (16, 16)
    """Grid that the code-ViT's positions are trained for; others interpolate."""
    caption_key: str | None = None
    """Key of the captions in a batch; `caption`, `text` or `txt` if null."""
    codebook_gradient: bool = False
    """Let the objectives move the codebook: z_q + (e_k - sg(e_k))."""
    start: int = 0
    """First step with our terms."""
    ramp: int = 0
    """Steps over which the weights grow to their values."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What a term that is not finite does."""
    seed: int = 0
    """Of the heads' initial weights, the masks and the choice of captions."""

    def __post_init__(self) -> None:
        _require(self.recipe in RECIPES, "recipe", "|".join(RECIPES), self.recipe)
        choices = ("raise", "skip")
        _require(self.on_nonfinite in choices, "on_nonfinite", "raise|skip", self.on_nonfinite)


RECIPES: dict[str, dict[str, Any]] = {
    "corrected": {},
    # Defects by their numbers in the list of the released code: 7 (temperature, one direction,
    # no gather), 2 (leak), 1 (padding), 10 (masking), 11 (smoothing), 3, 4 and 6 (relationship).
    "paper": {
        "global_semantic": {
            "temperature": 1.0,
            "learnable_temperature": False,
            "symmetric": False,
            "gather": False,
            "exclude_same": False,
        },
        "masked_text": {
            "mask_at": "output",
            "ratio": (0.1, 0.3),
            "label_smoothing": 0.1,
            "attend_padding": True,
            "dropout": 0.1,
        },
        "relationship": {"variant": "paper", "project": True},
    },
}


def parse(given: Mapping[str, Any] | None) -> LGVQConfig:
    """Read the `lgvq:` block over the defaults of its recipe.

    Raises:
        ConfigError: for an unknown key (the nearest one is named) or a value out of range.

    Example:
        >>> parse({"recipe": "paper"}).objectives.global_semantic.temperature
        1.0
        >>> parse({"objectives": {"masked_text": {"wieght": 1}}})
        Traceback (most recent call last):
        lgvq_plugin.sockets.ConfigError: unknown key lgvq.objectives.masked_text.wieght; did you...
    """
    block = dict(given or {})
    recipe = RECIPES.get(block.get("recipe", "corrected"), {})
    objectives = block.get("objectives") or {}
    _require(isinstance(objectives, Mapping), "lgvq.objectives", "a mapping", objectives)
    merged = dict(objectives)
    for name, defaults in recipe.items():
        own = objectives.get(name)
        if own is None or isinstance(own, Mapping):
            merged[name] = {**defaults, **(own or {})}
    return _build(LGVQConfig, {**block, "objectives": merged}, "lgvq")


def _build(cls: type[T], given: Any, path: str) -> T:
    _require(isinstance(given, Mapping), path, "a mapping", given)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}{suggest(key, list(known))}")
    types = get_type_hints(cls)
    values = {}
    for key, value in given.items():
        if is_dataclass(types[key]):
            value = _build(types[key], value or {}, f"{path}.{key}")  # type: ignore[arg-type]
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _require(holds: bool, key: str, expected: str, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
