"""The `lgvq:` block, its two recipes, and how plain YAML values become checked dataclasses."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from .sockets import FLOAT32, ConfigError, require_known, resolve, suggest

T = TypeVar("T")
LARGEST = {float: FLOAT32, int: 2**31 - 1}  # what float32 tensors and sizes can hold
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}


def require(holds: bool, key: str, expected: str, got: Any) -> None:
    """Raise a ConfigError that names the key and what was expected, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def to_plain(value: Any) -> Any:
    """Convert OmegaConf's (or any) mappings and sequences to dicts and lists, recursively."""
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    return [to_plain(inner) for inner in value] if _is_list(value) else value


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` merged over it, recursively.

    >>> laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        is_both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[key] = laid_over(inner, value) if is_both else value  # type: ignore[arg-type]
    return merged


def differing(old: Any, new: Any) -> list[str]:
    """Return the differences between two configs, each as "key: old then, new now".

    >>> differing({"a": {"b": 1, "c": (2,)}}, {"a": {"b": 3, "c": [2]}})
    ['a.b: 1 then, 3 now']
    """
    then, now = _flat(old), _flat(new)
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: to_plain(node)}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, _joined(prefix, key))
    return flat


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def build(cls: type[T], given: Any, path: str) -> T:
    """Build a dataclass from the mapping at `path` in a config, see :func:`read`.

    A missing key, and None for a dataclass, means the default.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    require(isinstance(given, Mapping), path, f"a mapping of {', '.join(known)}", given)
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}{suggest(key, known)}")
    values = {key: read(value, hints[key], f"{path}.{key}") for key, value in given.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # from __post_init__, which knows the key but not the path
        raise ConfigError(f"{path}.{error}") from error


def read(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as type `hint`, ConfigError if it is none; "1e-3" is a number in YAML 1.2.

    Types are numbers, booleans, strings, Literals, tuples, mappings, dataclasses, or one or None.

    >>> read("1e-3", float, "weight"), read([1, 2], tuple[int, int] | None, "grid")
    (0.001, (1, 2))
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hints = [h for h in inner if h is not type(None)]
        if {int, float} <= {*hints}:
            words = [word for h in hints for word in get_args(h)]  # of a Literal
            if isinstance(value, str) and words:
                is_number = value.replace(".", "", 1).isdigit()
                require(value in words or is_number, path, f"a number or {words[0]}", value)
            if value in words:
                return value
            number = float(_number(value, float, path))
            return int(number) if number.is_integer() else number
        # `str | tuple[str, ...]`: one or a list of them.
        fitting = (h for h in hints if (get_origin(h) is tuple) == _is_list(value))
        return read(value, next(fitting, hints[0]), path)
    if is_dataclass(hint):
        return build(hint, {} if value is None else value, path)  # type: ignore[arg-type]
    if origin is tuple and inner[-1] is Ellipsis:
        return tuple(read(each, inner[0], f"{path}[{i}]") for i, each in enumerate(value))
    if origin is tuple:
        example = "[16, 16]" if inner[0] is int else "[0.1, 0.5]"
        expected = f"{len(inner)} values, each {WORDS[inner[0]]}, like {example}"
        require(_is_list(value) and len(value) == len(inner), path, expected, value)
        try:
            return tuple(read(v, h, path) for v, h in zip(value, inner, strict=True))
        except ConfigError:
            raise ConfigError(f"{path}: expected {expected}, got {value!r}") from None
    if hint in (float, int):
        return _number(value, hint, path)
    if origin is Literal:
        require(value in inner, path, " or ".join(map(repr, inner)), value)
    elif hint in (bool, str):
        require(isinstance(value, hint), path, WORDS[hint], value)
    elif origin is not None:
        require(isinstance(value, Mapping), path, "a mapping", value)
    return value


def _number(value: Any, hint: type, path: str) -> float | int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    holds = abs(number) <= LARGEST[hint] and (hint is float or number.is_integer())
    limit = "" if math.isnan(number) else f" of at most {LARGEST[hint]:.3g}"
    require(holds, path, f"{WORDS[hint]}{limit}", value)
    return hint(number)


def verify(value: Any, hint: Any, key: str) -> None:
    """Check the value at `key` of a JSON file against a type, recursively, converting nothing.

    Types are those of :func:`read`, lists and TypedDicts; a list passes as a tuple of its length.

    Raises:
        ConfigError: for a value of another type, a missing key or, in a dataclass, an unknown one.

    >>> verify({"values": [1, "2"]}, dict[str, list[float]], "row")
    Traceback (most recent call last):
    lgvq_plugin.sockets.ConfigError: row.values[1]: expected a number, got '2'
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is not None or type(None) not in inner:
            verify(value, next(h for h in inner if h is not type(None)), key)
    elif origin is Literal:
        known = isinstance(value, str) and value in inner
        require(known, key, " or ".join(map(repr, inner)), value)
    elif origin in (list, tuple, Sequence):
        require(isinstance(value, list | tuple), key, "a list", value)
        is_fixed = origin is tuple and inner[-1] is not Ellipsis
        require(not is_fixed or len(value) == len(inner), key, f"{len(inner)} values", value)
        for i, part in enumerate(value):
            verify(part, inner[i if is_fixed else 0], f"{key}[{i}]")
    elif origin in (dict, Mapping):
        require(isinstance(value, Mapping), key, "a mapping", value)
        for name, part in value.items():
            verify(name, str, f"{key}: a key")
            verify(part, inner[1], _joined(key, name))
    elif is_dataclass(hint) or is_typeddict(hint):
        _verify_record(value, hint, key)
    elif hint in WORDS:
        require(_is_a(value, hint), key, WORDS[hint], value)


def _verify_record(value: Any, cls: Any, key: str) -> None:
    hints = get_type_hints(cls)
    require(isinstance(value, Mapping), key, f"a mapping of {', '.join(hints)}", value)
    needed = getattr(cls, "__required_keys__", ())
    if is_dataclass(cls):
        needed = [f.name for f in fields(cls) if MISSING is f.default is f.default_factory]
        for name in value:
            require(name in hints, _joined(key, name), f"one of {', '.join(hints)}", name)
    for name in sorted(needed):
        require(name in value, key, f"a mapping with {name!r}", [*value])
    for name in hints.keys() & value.keys():
        verify(value[name], hints[name], _joined(key, name))


def _is_a(value: Any, hint: type) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is str:  # JSON can hold half a surrogate pair, which cannot be encoded
        surrogates = range(0xD800, 0xE000)
        return isinstance(value, str) and not any(ord(letter) in surrogates for letter in value)
    if isinstance(value, int):
        return abs(value) < 2**63
    return hint is float and isinstance(value, float)


# -- the block -----------------------------------------------------------------------------------

MAX_WEIGHT = 1.0e6
"""Far above useful weights; float32 gradients overflow beyond."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1.0e-4, 100.0
"""Cosines are in [-1, 1]: lower ones overflow, higher ones make all pairs equal."""
MAX_PAIRS = 2**20
MAX_DEPTH = 256
OBJECTIVES = ("global_semantic", "masked_text", "relationship", "vision_alignment")
GUIDES = ("text", "vision")


class Limit(NamedTuple):
    """What the value of a key must satisfy, unless it is None."""

    expected: str
    holds: Callable[[Any], bool]


AT_LEAST_0 = Limit(">= 0", lambda number: number >= 0)
AT_LEAST_1 = Limit(">= 1", lambda number: number >= 1)
AT_LEAST_1_OR_NULL = Limit(">= 1 or null", lambda number: number >= 1)
WEIGHT = Limit(f">= 0 and <= {MAX_WEIGHT:g}", lambda weight: 0 <= weight <= MAX_WEIGHT)
PAIRS = Limit(f">= 0 and <= {MAX_PAIRS}", lambda count: 0 <= count <= MAX_PAIRS)
DEPTH = Limit(f">= 1 and <= {MAX_DEPTH}", lambda depth: 1 <= depth <= MAX_DEPTH)
SHARE = Limit(">= 0 and < 1", lambda share: 0 <= share < 1)
STEPS = Limit(
    "a number of steps, like 500, or a share of the run between 0 and 1, like 0.35",
    lambda steps: steps >= 0 and (steps < 1 or float(steps).is_integer()),
)
STOP = Limit(f"{STEPS.expected}; auto; or null", lambda stop: stop == "auto" or STEPS.holds(stop))
RANGE = Limit("0 < low <= high <= 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RATIO = Limit("> 0 and <= 1000, or null", lambda ratio: 0 < ratio <= 1000)
SEED = Limit(">= 0 and < 2**63", lambda seed: 0 <= seed < 2**63)
GRID = Limit("two whole numbers >= 1, like [16, 16], or null", lambda grid: min(grid) >= 1)
TEMPERATURE = Limit(
    f"> 0 (>= {MIN_TEMPERATURE:g}) and <= {MAX_TEMPERATURE:g}",
    lambda temperature: MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE,
)
MARGIN = Limit(">= 0 and < 2", lambda margin: 0 <= margin < 2)
PATHS = Limit(
    "a path, a list of different paths like [quantize_t, quantize_b], or null",
    lambda paths: isinstance(paths, str) or (all(paths) and 0 < len({*paths}) == len(paths)),
)


class Block:
    """A part of the config; it raises ConfigError for a value outside the limit of its key."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for limit in getattr(hint, "__metadata__", ()):
                shown = [*value] if limit in (RANGE, GRID) and value else value
                require(value is None or limit.holds(value), name, limit.expected, shown)


@dataclass(frozen=True, kw_only=True)
class GlobalSemanticConfig(Block):
    """L_gsa, global semantic alignment."""

    weight: Annotated[float, WEIGHT] = 0.05
    """Alpha; 0 disables the objective. Paper's configs: 0.001."""
    temperature: float = 0.03
    """Divides the cosines; 1 in the released code."""
    learnable_temperature: bool = True
    """Train the temperature, starting at `temperature`."""
    symmetric: bool = True
    """Average both directions; the released code uses image to text only."""
    gather: bool = True
    """Take negatives from all ranks."""
    exclude_same: bool = True
    """Exclude pairs with an identical caption from the negatives."""
    source: Literal["cls", "pooled"] = "pooled"
    """Feature of the image: the code-ViT's [CLS] (paper), or the mean of its patch tokens."""
    queue: Annotated[int, PAIRS] = 0
    """Number of pairs kept from earlier batches as further negatives."""
    words_weight: Annotated[float, WEIGHT] = 0.0
    """Weight of a second contrast, of captions' words with images' patches; 0: none."""
    words_span: Annotated[int, AT_LEAST_1] = 1
    """n-gram size of the second contrast; 1: single words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = 0.01 if self.learnable_temperature else MIN_TEMPERATURE
        holds = lowest <= self.temperature <= MAX_TEMPERATURE
        bounds = f">= {MIN_TEMPERATURE:g}, >= 0.01 if learnable"
        expected = f"> 0 ({bounds}) and <= {MAX_TEMPERATURE:g}"
        require(holds, "temperature", expected, self.temperature)


@dataclass(frozen=True, kw_only=True)
class MaskedTextConfig(Block):
    """L_mtp, masked text prediction."""

    weight: Annotated[float, WEIGHT] = 0.0
    """Beta; 0 disables the objective, which costs most and changed no measurement together with
    the other two. Paper's configs: 0.01."""
    mask_at: Literal["input", "output"] = "input"
    """Mask words before the text encoder, or (released code, leaks) after it."""
    ratio: Annotated[tuple[float, float], RANGE] = (0.15, 0.5)
    """Minimum and maximum share of masked words; at `output` bounds of a truncated normal."""
    vocabulary: Literal["seen", "full"] = "seen"
    """Words to choose from: those of the training captions so far, or (released code) all of the
    guide's. The first is faster; its values are lower, since there are fewer words to exclude."""
    label_smoothing: Annotated[float, SHARE] = 0.0
    """0.1 in the released code, none in the paper."""
    attend_padding: bool = False
    """Attend to padding, as the released code does: its padding mask has no effect."""
    attend_cls: bool = False
    """Let words attend to the code-ViT's [CLS] too, as the released code does."""
    depth: Annotated[int, DEPTH] = 2
    """Number of decoder blocks."""
    heads: Annotated[int, AT_LEAST_1] = 1
    """Attention heads in the decoder."""
    dropout: Annotated[float, SHARE] = 0.0
    """Dropout in the decoder; 0.1 in the released code."""


@dataclass(frozen=True, kw_only=True)
class RelationshipConfig(Block):
    """L_ras, relationship alignment."""

    weight: Annotated[float, WEIGHT] = 0.05
    """Gamma; 0 disables the objective. Paper's configs: 0.0001."""
    variant: Literal["paper", "pairs"] = "pairs"
    """See `functional.relationship_loss`."""
    between: Literal["words", "captions"] = "captions"
    """Relate the words of a caption, or the captions of a batch (images' mean codes); `pairs`
    only."""
    temperature: Annotated[float, TEMPERATURE] = 0.1
    """Temperature of the soft matching; `pairs` only."""
    matching: Literal["soft", "straight_through"] = "soft"
    """Match a word to a mixture of codes, or to the best with `soft`'s gradient; `pairs` only."""
    project: bool = False
    """Project codes by a learned layer, as the released code does; false: raw codes (paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.between == "words" or self.variant == "pairs"
        require(holds, "between", "words, or variant: pairs with it", self.between)


@dataclass(frozen=True, kw_only=True)
class VisionAlignmentConfig(Block):
    """Alignment with a frozen image tower, `guides.vision`; needs no captions."""

    weight: Annotated[float, WEIGHT] = 0.0
    """0 disables the objective; the others' default is 0.05."""
    form: Literal["va_vae", "cosine_margin", "distance"] = "va_vae"
    """Compare each code with the tower's feature at its place, or the similarities between codes
    with those between features, or both (VA-VAE, arXiv 2501.01423)."""
    target: Literal["patch", "class"] = "patch"
    """The tower's patches, resized to the grid of the codes, or its class token (the mean patch of
    towers without one) for the mean code of an image; `distance` then relates the images of a
    batch."""
    source: Literal["codes", "code_vit"] = "codes"
    """What is aligned: the codes, or the code-ViT's tokens."""
    cosine_margin: Annotated[float, MARGIN] = 0.5
    """A cosine of at least 1 minus this costs nothing."""
    distance_margin: Annotated[float, MARGIN] = 0.25
    """A difference of two similarities of at most this costs nothing."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Block):
    """Keys of any objective; those of other packages may inherit from it."""

    weight: Annotated[float, WEIGHT] = 0.0
    """Weight of the objective; 0 disables it."""


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """The three objectives of LG-VQ, alignment with an image tower, and those of other packages."""

    global_semantic: GlobalSemanticConfig = field(default_factory=GlobalSemanticConfig)
    """L_gsa."""
    masked_text: MaskedTextConfig = field(default_factory=MaskedTextConfig)
    """L_mtp."""
    relationship: RelationshipConfig = field(default_factory=RelationshipConfig)
    """L_ras."""
    vision_alignment: VisionAlignmentConfig = field(default_factory=VisionAlignmentConfig)
    """Alignment with an image tower; off by default."""
    others: ClassVar[Mapping[str, Any]] = {}
    """Config of each objective of another package, by the name that the block gives it; no key."""

    def items(self) -> list[tuple[str, Any]]:
        """Return name and config of each objective."""
        return [*((name, getattr(self, name)) for name in OBJECTIVES), *self.others.items()]


@dataclass(frozen=True, kw_only=True)
class CodeViTConfig(Block):
    """The code-ViT."""

    width: Annotated[int | None, AT_LEAST_1_OR_NULL] = None
    """Width of the transformer; null: the code width, or `min_width` for narrower codes."""
    min_width: Annotated[int, AT_LEAST_1] = 128
    """Smallest width that `width: null` gives; codes of another width are projected."""
    depth: Annotated[int, DEPTH] = 1
    """Number of blocks; 2 in the released code."""
    heads: int = 1
    """Attention heads; must divide the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.heads >= 1 and (self.width or self.heads) % self.heads == 0
        require(holds, "heads", ">= 1 and a divisor of the width", self.heads)


@dataclass(frozen=True, kw_only=True)
class LGVQConfig(Block):
    """Everything under `lgvq:`."""

    recipe: Literal["corrected", "paper", "corrected_v1"] = "corrected"
    """Defaults of all keys below: the corrected method, the released arithmetic, or what
    `corrected` was in version 0.1."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """Settings of the objectives."""
    guide: Mapping[str, Any] = field(default_factory=lambda: {"use": "open_clip"})
    """The text guide: `use:` is a member of guides or a dotted path; other keys go to its
    constructor. It is not built if no objective reads text."""
    guides: Mapping[str, Any] = field(default_factory=dict)
    """Guides by what they read: `vision`, the image tower of `vision_alignment`, in the form of
    `guide`; `text` is another name of `guide`, where :func:`parse` puts it."""
    code_vit: CodeViTConfig = field(default_factory=CodeViTConfig)
    """The code-ViT."""
    quantizer: Annotated[str | tuple[str, ...] | None, PATHS] = None
    """Path of the host's quantizer; null: found by name. A list for hosts with several levels
    (VQ-VAE-2): coarse grids are upsampled to the finest, and codes concatenated per position."""
    layout: Literal["channels_first", "channels_last"] | None = None
    """Layout of the quantized vectors: (B, C, h, w) or (B, C, N), or (B, h, w, C) or (B, N, C);
    null: inferred from the width of a code, the indices' shape and the codebook's values."""
    code_dim: Annotated[int | None, AT_LEAST_1_OR_NULL] = None
    """Width of a code; null: read from the quantizer."""
    grid: Annotated[tuple[int, int] | None, GRID] = None
    """(h, w) of the code-ViT's position embeddings, and of codes that the host returns as rows;
    null: read from the host, else 16 x 16. Codes of another grid interpolate the position
    embeddings, with a warning if this key is set."""
    caption_key: str | None = None
    """Key of the captions in a batch; null: `caption`, `captions`, `text` or `txt`."""
    codebook_gradient: bool = False
    """Let the objectives train the codebook: z_q + (e_k - sg(e_k))."""
    gradient_ratio: Annotated[float | None, RATIO] = 1.0
    """Length of our gradient at the codes relative to the host's, on average over the batches (see
    `every`); the weights then only divide it among the objectives. null: the weights decide
    (released code)."""
    every: Annotated[int, AT_LEAST_1] = 5
    """Compute the objectives in the first training batch, and then only in every n-th, n times as
    strong: the same pull on average at a fraction of the cost (lazy regularization,
    arXiv:1912.04958). 1: in each batch, which is also so where only the heads train."""
    feature_cache: Annotated[int, AT_LEAST_0] = 256
    """MiB of memory for the text features of captions that were encoded before; 0: none."""
    compile: bool = False
    """Compile the code-ViT and the text decoder with torch.compile, at the first step. Results
    differ by rounding; copies of the heads, as in an EMA, are not compiled."""
    start: Annotated[int | float, STEPS] = 0
    """First step with the objectives; like `ramp` and `stop` a number of steps, or a share (0.35)
    of the steps from the heads' first one to the end of the run."""
    ramp: Annotated[int | float, STEPS] = 0
    """Steps over which the weights grow linearly to their values; in the unit of `start`."""
    stop: Annotated[int | float | Literal["auto"] | None, STOP] = "auto"
    """First step that trains the host alone again; null: never. auto: after a share of 0.7 of the
    run, so that reconstruction settles, where the length of the run is known and `start` is neither
    a number of steps nor a later share; else never."""
    total_steps: Annotated[int | None, AT_LEAST_1_OR_NULL] = None
    """Length of the run, which shares need; null: that of `lgvq train` or Lightning's trainer."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do on NaN/inf in a term or a gradient: raise an error, or skip it in the update, at
    most 25 times in a row (3 if the heads' own weights are not finite)."""
    seed: Annotated[int, SEED] = 0
    """Seed of the heads' initial weights, the masks and the choice of captions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.gradient_ratio
        expected = "null with codebook_gradient: true, whose gradient bypasses the codes"
        require(ratio is None or not self.codebook_gradient, "gradient_ratio", expected, ratio)
        expected = f"> start ({self.start}), or null"
        stop = math.inf if self.stop is None or self.stop == "auto" else self.stop
        holds = stop > self.start or not same_unit(self.start, stop)
        require(holds, "stop", expected, self.stop)
        expected = f"in the unit of start ({self.start}): both steps, or both shares"
        require(same_unit(self.start, self.ramp), "ramp", expected, self.ramp)


def is_share(value: float | str | None) -> bool:
    """Whether a key of the schedule is a share of the run, not a number of steps."""
    return isinstance(value, int | float) and 0 < value < 1


def same_unit(one: float, other: float) -> bool:
    """Whether two keys of the schedule can be compared; 0 is in either unit."""
    return is_share(one) == is_share(other) or one == 0 or other == 0


def to_block(config: LGVQConfig) -> dict[str, Any]:
    """Return the `lgvq:` block that :func:`parse` reads as `config`."""
    block = asdict(config)
    block["objectives"] |= {name: asdict(own) for name, own in config.objectives.others.items()}
    return block


RECIPES: dict[str, dict[str, Any]] = {
    "corrected": {},
    "paper": {
        "objectives": {
            "global_semantic": {
                "weight": 1.0e-3,
                "temperature": 1.0,
                "learnable_temperature": False,
                "symmetric": False,
                "gather": False,
                "exclude_same": False,
                "source": "cls",
            },
            "masked_text": {
                "weight": 1.0e-2,
                "mask_at": "output",
                "ratio": (0.1, 0.3),
                "vocabulary": "full",
                "label_smoothing": 0.1,
                "attend_padding": True,
                "attend_cls": True,
                "dropout": 0.1,
            },
            "relationship": {
                "weight": 1.0e-4,
                "variant": "paper",
                "between": "words",
                "project": True,
            },
        },
        "code_vit": {"min_width": 1, "depth": 2},
        "gradient_ratio": None,
        "every": 1,
        "stop": None,
    },
    "corrected_v1": {
        "objectives": {
            "global_semantic": {"weight": 1.0e-3, "temperature": 0.07, "source": "cls"},
            "masked_text": {"weight": 1.0e-2},
            "relationship": {"weight": 1.0e-4, "between": "words"},
        },
        "code_vit": {"min_width": 1, "depth": 2},
        "gradient_ratio": None,
        "every": 1,
        "stop": None,
    },
}
"""What each recipe changes in the defaults of the classes above."""
DEFAULTS, FIRST_RECIPE = 2, "corrected_v1"
"""Which defaults a saved `lgvq:` block means; files of version 0.1 have no such number."""


def of_first_version(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block that version 0.1 saved, its defaults of then by their present name.

    >>> of_first_version({"ramp": 5})
    {'ramp': 5, 'recipe': 'corrected_v1'}
    """
    is_default = block.get("recipe") in (None, "corrected")
    return {**block, "recipe": FIRST_RECIPE} if is_default else dict(block)


def require_finite_weights(params: Mapping[str, Any], path: str) -> None:
    """Refuse weights of a base loss that are not finite in float32: inf * 0 is NaN at once.

    >>> require_finite_weights({"disc_weight": float("inf"), "disc_start": float("inf")}, "p")
    Traceback (most recent call last):
    lgvq_plugin.sockets.ConfigError: p.disc_weight: expected a number of at most 1e+06, got inf
    """
    for key, value in params.items():
        if isinstance(value, Mapping) and key != "lgvq":
            require_finite_weights(value, f"{path}.{key}")
        is_weight = str(key).endswith(("weight", "factor")) and not isinstance(value, bool)
        if is_weight and isinstance(value, int | float):
            expected = f"a number of at most {MAX_WEIGHT:g}"
            require(abs(value) <= MAX_WEIGHT, f"{path}.{key}", expected, value)


def parse(given: Mapping[str, Any] | None) -> LGVQConfig:
    """Read the `lgvq:` block over its recipe's defaults.

    Raises:
        ConfigError: for an unknown key (the nearest one is named) or a wrong value.

    Example:
        >>> parse({"recipe": "paper"}).objectives.global_semantic.temperature
        1.0
        >>> parse({"objectives": {"masked_text": {"wieght": 1}}})
        Traceback (most recent call last):
        lgvq_plugin.sockets.ConfigError: unknown key lgvq.objectives.masked_text.wieght; did you...
    """
    block = with_text_guide(_mapping(to_plain(given), "lgvq", "{recipe: paper}"))
    recipe = block.get("recipe", "corrected")
    require_known([recipe], RECIPES, "lgvq.recipe: no recipe {!r}")
    example = "{masked_text: {weight: 0.01}}"
    objectives = _mapping(block.get("objectives"), "lgvq.objectives", example)
    own = {name: {} if keys is None else keys for name, keys in objectives.items()}
    guide = _mapping(block.get("guide"), "lgvq.guide", "{use: micro_clip}")
    others = _others(own)
    ours = {name: keys for name, keys in own.items() if name not in others}
    below = dict(RECIPES[recipe])
    if block.get("codebook_gradient") is True:  # it bypasses the codes
        below["gradient_ratio"] = None
    above = {**block, "objectives": ours, "code_vit": block.get("code_vit") or {}}
    merged = laid_over(below, above) | {"guide": {"use": "open_clip", **guide}}
    merged["guides"] = _guides(block.get("guides"))
    config = build(LGVQConfig, merged, "lgvq")
    object.__setattr__(config.objectives, "others", others)  # a frozen dataclass
    return config


def _guides(given: Any) -> dict[str, Any]:
    guides = _mapping(given, "lgvq.guides", "{vision: {use: timm}}")
    require_known(guides, GUIDES, "unknown key lgvq.guides.{}")
    for name, guide in guides.items():
        _mapping(guide, f"lgvq.guides.{name}", "{use: timm}")
    return {name: guide for name, guide in guides.items() if guide is not None}


def with_text_guide(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `lgvq:` block whose `guides.text` has moved to `guide`, its other name.

    Raises:
        ConfigError: if both are given.

    >>> with_text_guide({"guides": {"text": {"use": "micro_clip"}}})
    {'guide': {'use': 'micro_clip'}}
    """
    guides = block.get("guides")
    if not isinstance(guides, Mapping) or guides.get("text") is None:
        return dict(block)
    if block.get("guide") is not None:
        raise ConfigError(
            "lgvq.guide and lgvq.guides.text are two names of the text guide, and both are given: "
            f"{block['guide']!r} and {guides['text']!r}; keep one"
        )
    rest = {key: value for key, value in guides.items() if key != "text"}
    above = {"guide": guides["text"], **({"guides": rest} if rest else {})}
    return {key: value for key, value in block.items() if key != "guides"} | above


def _others(objectives: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configs of objectives of other packages; raises ConfigError if one is wrong."""
    others = {}
    for name in (each for each in objectives if each not in OBJECTIVES):
        path = f"lgvq.objectives.{name}"
        try:
            member = resolve("objectives", name)
        except ConfigError as error:
            _, is_unknown, near = str(error).partition(f"unknown member of objectives: {name!r}")
            raise ConfigError(
                f"unknown key {path}{near}" if is_unknown else f"{path}: {error}"
            ) from error
        cls: Any = getattr(member, "config_class", None)
        holds = is_dataclass(cls) and "weight" in {each.name for each in fields(cls)}
        expected = "a subclass of lgvq_plugin.AbstractObjective with a config_class"
        require(holds, path, expected, member)
        others[name] = build(cls, objectives[name], path)
    return others


def _mapping(value: Any, key: str, example: str) -> dict[str, Any]:
    require(isinstance(value or {}, dict), key, f"a mapping, for instance {example}", value)
    return value or {}
