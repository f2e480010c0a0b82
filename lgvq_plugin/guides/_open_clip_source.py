"""Where the weights of an open_clip model lie: a path, the cache, or the network; told fast."""

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn

from ..functional import seeded
from ..sockets import ConfigError, suggest
from ._hub import DEMO_ONLY, cache_folder, reach

log = logging.getLogger(__name__)


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
        log.warning("guide: %s has random weights (pretrained: null); for benchmarks only", model)
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
