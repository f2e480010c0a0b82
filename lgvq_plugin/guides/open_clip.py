"""Where the weights of an open_clip model lie: a path, the cache, or the network; told fast."""

import contextlib
import logging
import os
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ..functional import seeded
from ..sockets import ConfigError, suggest
from ._hub import DEMO_ONLY, cache_folder, reach
from .tokens import AbstractTokenGuide, Row, number_words

logger = logging.getLogger(__name__)


def load_text(
    model: str, pretrained: str | None, *, cache_dir: str | None, seed: int
) -> tuple[nn.Module, Any]:
    """Return the text tower and the tokenizer of an open_clip model; the image tower is dropped.

    The global random stream stays as it was.

    Raises:
        ConfigError: if the model, the tag or a file does not exist, or if its weights are
            neither in the cache nor to be had from the network within seconds.
    """
    name = model.replace("/", "-") if ":" not in model else model
    options: dict[str, Any] = {}
    archive = None
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")), model)
        pretrained = None
    elif name.startswith("hf-hub:"):
        name, pretrained = _hub_folder(name, cache_dir), None
    elif open_clip.get_model_config(name) is None:
        raise ConfigError(f"guide.model: no open_clip model {model!r}{_near(name)}")
    elif pretrained is None:
        logger.warning(
            "guide: %s has random weights (pretrained: null); for benchmarks only", model
        )
    else:
        # The tag knows whether its weights want QuickGELU; `ViT-B-32` alone would not.
        tag = get_pretrained_cfg(name, pretrained)
        options["force_quick_gelu"] = bool(tag.get("quick_gelu"))
        pretrained = _weights_file(name, pretrained, tag, cache_dir)
        if _is_archive(pretrained):
            options["force_quick_gelu"] = True
            archive, pretrained = pretrained, None
    with seeded(seed), _quiet():
        try:
            network = open_clip.create_model(
                name, pretrained, force_custom_text=True, cache_dir=cache_dir, **options
            )
            if archive is not None:
                network.text.load_state_dict(_read_archive(archive))
            tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        except Exception as error:  # a foreign file can break in any way
            raise ConfigError(
                f"guide: open_clip cannot load model {model!r}, pretrained "
                f"{archive or pretrained!r}: {error}"
            ) from error
    return network.text, tokenizer


def _weights_file(model: str, pretrained: str, tag: dict[str, Any], cache_dir: str | None) -> str:
    """Return a local file, or the tag itself where open_clip can download it."""
    if not tag:
        if os.path.isfile(os.path.expanduser(pretrained)):
            return os.path.expanduser(pretrained)
        tags = list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"guide.pretrained: {pretrained!r} is neither a file nor a tag of {model}"
            f"{suggest(pretrained, tags)}; or give a file: guide: {{use: open_clip, pretrained: "
            f"PATH}}; null gives random weights. {DEMO_ONLY}"
        )
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        url = tag.get("url", "")
        file = Path(cache_dir or "~/.cache/clip").expanduser() / os.path.basename(url)
        if not file.is_file():
            reach(url, f"model {model!r}, pretrained {pretrained!r}", str(file))
        return pretrained
    file = file or constants.PYTORCH_WEIGHTS_NAME.replace("pytorch", "open_clip_pytorch")
    for candidate in (*_safe_names(file), file):
        cached = try_to_load_from_cache(repository, candidate, cache_dir=cache_dir)
        if isinstance(cached, str):
            return cached
    sought = f"model {model!r}, pretrained {pretrained!r} (hub repository {repository})"
    reach(constants.ENDPOINT, sought, cache_folder(repository, cache_dir))
    return pretrained


def _is_archive(file: str) -> bool:
    """Tell whether this is TorchScript, as OpenAI's own `ViT-B-32.pt` is (with QuickGELU)."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as content:
        return any(name.endswith("/constants.pkl") for name in content.namelist())


def _read_archive(file: str) -> dict[str, Tensor]:
    """Return the text half of a CLIP in TorchScript."""
    state = torch.jit.load(file, map_location="cpu").state_dict()
    state = convert_to_custom_text_state_dict(state)
    return {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}


def _hub_folder(name: str, cache_dir: str | None) -> str:
    """Return `local-dir:` of a cached snapshot, or the name itself where it can be downloaded."""
    repository = name.removeprefix("hf-hub:")
    cached = try_to_load_from_cache(repository, "open_clip_config.json", cache_dir=cache_dir)
    if isinstance(cached, str) and _holds_weights(Path(cached).parent):
        return f"local-dir:{Path(cached).parent}"
    reach(constants.ENDPOINT, f"hub repository {repository}", cache_folder(repository, cache_dir))
    return name


def _check_folder(folder: Path, model: str) -> None:
    if not (folder / "open_clip_config.json").is_file() or not _holds_weights(folder):
        raise ConfigError(
            f"guide.model: {model!r}: expected a folder with open_clip_config.json and weights "
            f"(*.safetensors, *.bin, *.pth), found {sorted(p.name for p in folder.glob('*'))}"
        )


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.glob("*"))


def _safe_names(file: str) -> tuple[str, ...]:
    # Hub repositories hold the safetensors twin under one of two names.
    if file == "open_clip_pytorch_model.bin":
        return "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"
    return (f"{Path(file).stem}.safetensors",)


def _near(name: str) -> str:
    hint = suggest(name, open_clip.list_models()).partition(" Known:")[0]
    return f"{hint} open_clip.list_models() tells all; also 'hf-hub:org/name', 'local-dir:/path'"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's notes on the root logger; we have told what matters."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


# -- What the guides on open_clip's text tower share; they differ in where the tower comes from ----


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


# -- Any text tower of open_clip as the guide; by default that of CLIP ViT-B/32, as in the paper ---


class OpenCLIPGuide(OpenCLIPText):
    """A text tower of open_clip.

    Args:
        model: name of an open_clip model, `hf-hub:org/name` or `local-dir:/path`.
        pretrained: tag or local file, for a plain model name; None gives random weights, with a
            warning, for benchmarks.
        max_length: tokens a caption is cut to, start and end included; 30 in the paper's code.
        device: where the tower goes; the CPU if not given.
        cache_dir: where downloaded weights lie; Hugging Face's own cache if not given.
        seed: of random weights.

    Raises:
        ConfigError: if the model or its weights cannot be found; the message says where they
            were sought.

    Example:
        >>> guide = OpenCLIPGuide("ViT-S-32-alt", pretrained=None, max_length=8)
        >>> guide.encode(["a red circle"]).tokens.shape, guide.sentence_dim
        (torch.Size([1, 8, 256]), 256)
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        max_length: int = 30,
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, str) or not isinstance(pretrained, str | None):
            raise ConfigError(f"guide: expected names, got {model!r} and {pretrained!r}")
        self._source = {
            "model": model,
            "pretrained": pretrained,
            "cache_dir": cache_dir,
            "seed": seed,
        }
        tower, tokenizer = load_text(model, pretrained, cache_dir=cache_dir, seed=seed)
        super().__init__(tower, tokenizer, max_length=max_length, device=device)

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {**self._source, "max_length": self.max_length, "device": str(self.device)}
