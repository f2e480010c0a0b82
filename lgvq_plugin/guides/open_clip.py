"""The text or image tower of an open_clip model as a guide; by default of CLIP ViT-B/32."""

import contextlib
import logging
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from huggingface_hub import constants
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ..functional import seeded
from ..hub import DEMO_ONLY, KEYS, Kind, find_cached, require_hub, require_reachable
from ..sockets import ConfigError, as_config_error, suggest
from .images import AbstractImageTower, Tower, TowerOptions, require_file, require_layer, square
from .tokens import AbstractTokenGuide, Row, require_length, with_mean_row

logger = logging.getLogger(__name__)


class OpenCLIPText(AbstractTokenGuide):
    """A text tower of open_clip, frozen, with an additional token for masked words.

    CLIP has no mask token, so the embedding of that token is the mean of all: an average word of
    usual size, the same for every masked word. Words are replaced before the first layer, so no
    feature depends on them. The caption is pooled at its end token.

    A causal tower never looks ahead, so it gets the longest caption's positions only, with the same
    result as with its whole context. Other towers get the whole context, and the result is cut.

    Features of the same batch are bit-identical. Those of the same caption in another batch may
    differ by about 1e-5, since matrix products are split by batch size.

    Args:
        tower: text tower, owned and changed by the guide.
        tokenizer: byte-pair tokenizer of the tower.
        max_length: captions are cut to this many tokens, start and end included.
        device: device of the tower; the CPU by default.

    Raises:
        ConfigError: if max_length is no int from 3 to the tower's context, or the tower or the
            tokenizer is of another kind.
    """

    _source: dict[str, Any] = {}

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
        self.max_length = require_length(max_length, tower.context_length)
        self._tokenizer, self.pad_id = tokenizer, tower.pad_id
        is_causal = tower.attn_mask is not None and tower.cls_emb is None
        self._is_trimmed = is_causal and tower.pool_type in ("argmax", "eos")
        self._words = self._mask_id = tower.vocab_size
        self._network: TextTransformer = tower.float().eval().requires_grad_(False)
        self._embedding = tower.token_embedding = with_mean_row(tower.token_embedding)
        if tower.pool_type == "argmax":
            # The end token has the largest id except for the new one: name it instead.
            tower.pool_type, tower.eos_id = "eos", tokenizer.eot_token_id
        if self._is_trimmed:
            tower.register_buffer("causal_mask", tower.attn_mask, persistent=False)
        self.token_dim = self.sentence_dim = tower.width
        if isinstance(tower.text_projection, nn.Linear):
            self.sentence_dim = tower.text_projection.out_features
        elif tower.text_projection is not None:
            self.sentence_dim = tower.text_projection.shape[1]
        self.to("cpu" if device is None else device)

    def _rows(self, captions: Sequence[str]) -> list[Row]:
        tokenizer = self._tokenizer
        rows: list[Row] = []
        for caption in captions:
            pieces, words, word = tokenizer.encode(caption), [], 0
            for piece in pieces:
                # A special token that is spelled out in a caption is neither masked nor predicted.
                words.append(-1 if piece in tokenizer.all_special_ids else word)
                word += tokenizer.decoder[piece].endswith("</w>")
            ids = [tokenizer.sot_token_id, *pieces, tokenizer.eot_token_id]
            rows.append((ids, [-1, *words, -1]))
        return rows

    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        network, length = self._network, ids.shape[1]
        if self._is_trimmed:
            network.attn_mask = network.causal_mask[:length, :length]
        else:
            ids = nn.functional.pad(ids, (0, network.context_length - length), value=self.pad_id)
        states = network.forward_intermediates(
            ids, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        return states["text_intermediates"][0][:, :length], states["text_features"]


class OpenCLIPGuide(OpenCLIPText):
    """A pretrained text tower of open_clip.

    Args:
        model: name of an open_clip model, `hf-hub:org/name` or `local-dir:/path`.
        pretrained: tag or local file, for a plain model name; None gives random weights, with a
            warning, for benchmarks.
        max_length: captions are cut to this many tokens, start and end included; 30 in the
            paper's code.
        device: device of the tower; the CPU by default.
        cache_dir: folder of downloaded weights; Hugging Face's own cache by default.
        seed: seed of random weights.
        dtype: float32, or bfloat16 for speed; features are float32 in either case.

    Raises:
        ConfigError: if the model or its weights cannot be found; the message lists the places
            that were searched.

    Example:
        >>> guide = OpenCLIPGuide("ViT-S-32-alt", pretrained=None, max_length=8)
        >>> guide.encode(["a red circle"]).tokens.shape, guide.sentence_dim
        (torch.Size([1, 5, 256]), 256)
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        max_length: int = 30,
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if not isinstance(model, str) or not isinstance(pretrained, str | None):
            raise ConfigError(f"guide: expected names, got {model!r} and {pretrained!r}")
        places: dict[str, Any] = {"cache_dir": cache_dir, "seed": seed}
        self._source = {"model": model, "pretrained": pretrained, **places}
        tower, name = load_tower(model, pretrained, kind="text", **places)
        with _quiet(), as_config_error(f"guide: open_clip has no tokenizer for model {model!r}"):
            tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        super().__init__(tower, tokenizer, max_length=max_length, device=device)
        self._set_dtype(dtype)


class OpenCLIPVision(AbstractImageTower):
    """An image tower of open_clip, by default CLIP's ViT-B/32.

    Features are those of a layer, after the tower's final norm, not of the projection to the text.
    Arguments as :class:`~.images.AbstractImageTower`: `model` is a name, `hf-hub:org/name` or
    `local-dir:/path`; `pretrained` is a tag of the model, true for the tag `openai`, or the only
    one there is; `checkpoint` is a file.

    Example:
        >>> import torch
        >>> guide = OpenCLIPVision("ViT-S-32-alt", pretrained=False)
        >>> guide.encode(torch.rand(2, 3, 64, 64) * 2 - 1).patches.shape
        torch.Size([2, 49, 384])
    """

    default_model = "ViT-B-32"

    def _load(self, given: TowerOptions) -> Tower:
        weights = _image_weights(given)
        options: dict[str, Any] = {"cache_dir": given.cache_dir, "seed": given.seed}
        if given.image_size is not None:
            options["force_image_size"] = given.image_size
        tower: Any
        tower, _ = load_tower(given.model, weights, kind="image", **options)
        self._layer = require_layer(given.layer, _depth(tower), given.model)
        facts = tower.preprocess_cfg
        return Tower(tower, square(facts["size"]), facts["mean"], facts["std"])

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        network: Any = self._network
        trunk = getattr(network, "trunk", None)  # of timm: perhaps without a class token
        has_class = trunk is None or getattr(trunk, "cls_token", None) is not None
        result = network.forward_intermediates(
            images,
            indices=[self._layer],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_extra_tokens=has_class,
        )
        prefix = result.get("image_intermediates_prefix")
        return result["image_intermediates"][0], None if prefix is None else prefix[0][:, 0]


def _image_weights(given: TowerOptions) -> str | None:
    """Return the tag or file of weights, None for random ones or a model that has its own."""
    model, pretrained = given.model, given.pretrained
    if not isinstance(model, str):
        raise ConfigError(f"guides.vision.model: expected a name, got {model!r}")
    if given.checkpoint is not None:
        return str(require_file(given.checkpoint))
    if pretrained is not True:
        return pretrained or None
    name = model.replace("/", "-")
    if ":" in name or open_clip.get_model_config(name) is None:  # load_tower reports the latter
        return None
    tags = list_pretrained_tags_by_model(name)
    if "openai" in tags:
        return "openai"
    if len(tags) != 1:
        known = ", ".join(tags) or "none, so give checkpoint: PATH"
        raise ConfigError(
            f"guides.vision.pretrained: name the weights of {model!r} by their tag: {known}"
        )
    return tags[0]


def _depth(tower: Any) -> int:
    """Return the number of layers of an open_clip image tower: a ViT, one of timm, or a ResNet."""
    if hasattr(tower, "trunk"):
        return len(tower.trunk.feature_info)
    transformer: nn.Module | None = getattr(tower, "transformer", None)
    return 5 if transformer is None else len(transformer.resblocks)  # type: ignore[arg-type]


def load_tower(
    model: str,
    pretrained: str | None,
    *,
    kind: Kind,
    cache_dir: str | None,
    seed: int,
    **options: Any,
) -> tuple[nn.Module, str]:
    """Return one tower of an open_clip model, and the name by which open_clip knows the model.

    The global random state is kept; `options` go to `open_clip.create_model`.

    Raises:
        ConfigError: if the model, the tag or a file does not exist, or if its weights are neither
            cached nor available from the network within seconds.
    """
    key = KEYS[kind]
    name = model.replace("/", "-") if ":" not in model else model
    archive = None
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")), model, key)
        pretrained = None
    elif name.startswith("hf-hub:"):
        name, pretrained = _hub_folder(name, cache_dir, kind), None
    elif open_clip.get_model_config(name) is None:
        hint = suggest(name, open_clip.list_models()).partition(" Known:")[0]
        raise ConfigError(
            f"{key}.model: no open_clip model {model!r}{hint} open_clip.list_models() lists all; "
            "also 'hf-hub:org/name', 'local-dir:/path'"
        )
    elif pretrained is None:
        logger.warning(
            "%s: %s has random weights (pretrained: %s); for benchmarks only",
            *(key, model, "null" if kind == "text" else "false"),
        )
    else:
        # The tag knows whether its weights need QuickGELU; `ViT-B-32` alone does not.
        tag = get_pretrained_cfg(name, pretrained)
        options["force_quick_gelu"] = bool(tag.get("quick_gelu"))
        pretrained = _weights_file(name, pretrained, tag, cache_dir, kind)
        if _is_torchscript(pretrained):
            options["force_quick_gelu"] = True
            archive, pretrained = pretrained, None
    failed = f"{key}: open_clip cannot load model {model!r}, pretrained {archive or pretrained!r}"
    with seeded(seed), _quiet(), as_config_error(failed):
        network = open_clip.create_model(
            name, pretrained, force_custom_text=True, cache_dir=cache_dir, **options
        )
        tower = network.get_submodule({"text": "text", "image": "visual"}[kind])
        if archive is not None:
            _load_archive(tower, archive, kind)
    return tower, name


def _load_archive(tower: nn.Module, archive: str, kind: Kind) -> None:
    whole = torch.jit.load(archive, map_location="cpu").state_dict()
    state = convert_to_custom_text_state_dict(whole)
    prefix = {"text": "text.", "image": "visual."}[kind]
    own = {key: value for key, value in state.items() if key.startswith(prefix)}
    tower.load_state_dict({key.removeprefix(prefix): value for key, value in own.items()})


def _weights_file(
    model: str,
    pretrained: str,
    tag: dict[str, Any],
    cache_dir: str | None,
    kind: Kind,
) -> str:
    """Return a local file, or the tag itself if open_clip can download it."""
    if not tag:
        path = Path(pretrained).expanduser()
        if path.is_file():
            return str(path)
        tags = list_pretrained_tags_by_model(model)
        if kind == "image":
            raise ConfigError(
                f"guides.vision.pretrained: {pretrained!r} is no tag of {model}"
                f"{suggest(pretrained, tags)}; a local file goes under checkpoint: PATH"
            )
        raise ConfigError(
            f"guide.pretrained: {pretrained!r} is neither a file nor a tag of {model}"
            f"{suggest(pretrained, tags)}; or give a file: guide: {{use: open_clip, pretrained: "
            f"PATH}}; null gives random weights. {DEMO_ONLY}"
        )
    sought = f"model {model!r}, pretrained {pretrained!r}"
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        url = tag.get("url", "")
        path = Path(cache_dir or "~/.cache/clip").expanduser() / url.rpartition("/")[2]
        if not path.is_file():
            require_reachable(url, sought, str(path), kind)
        return pretrained
    file = file or constants.PYTORCH_WEIGHTS_NAME.replace("pytorch", "open_clip_pytorch")
    safe = [f"{Path(file).stem}.safetensors"]
    if file == "open_clip_pytorch_model.bin":
        safe.insert(0, "open_clip_model.safetensors")
    if cached := find_cached(repository, (*safe, file), cache_dir):
        return str(cached)
    require_hub(repository, f"{sought} (hub repository {repository})", cache_dir, kind)
    return pretrained


def _is_torchscript(file: str) -> bool:
    """Return whether this is an archive like OpenAI's own `ViT-B-32.pt` (with QuickGELU)."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as content:
        return any(name.endswith("/constants.pkl") for name in content.namelist())


def _hub_folder(name: str, cache_dir: str | None, kind: Kind) -> str:
    """Return `local-dir:` of a cached snapshot, or the name itself if it can be downloaded."""
    repository = name.removeprefix("hf-hub:")
    cached = find_cached(repository, ["open_clip_config.json"], cache_dir)
    if cached and _has_weights(cached.parent):
        return f"local-dir:{cached.parent}"
    require_hub(repository, f"hub repository {repository}", cache_dir, kind)
    return name


def _check_folder(folder: Path, model: str, key: str) -> None:
    if not (folder / "open_clip_config.json").is_file() or not _has_weights(folder):
        raise ConfigError(
            f"{key}.model: {model!r}: expected a folder with open_clip_config.json and weights "
            f"(*.safetensors, *.bin, *.pth), found {sorted(p.name for p in folder.glob('*'))}"
        )


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.glob("*"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's messages on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
