"""A tokenizer as a folder: model.safetensors, config.json and a model card; heads as another."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..encoder import SavedHeads
from ..files import write_bytes, write_json, write_text
from ..hub import download, hub_errors
from ..sockets import ConfigError
from ..training.config import lgvq_block, loss_section
from .load import HEADS, Checkpoint, load_host, sizes_of
from .read import split, unflatten

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
CARD_HEAD = """---
library_name: lgvq_plugin
tags: [vector-quantization, image-tokenizer, lg-vq]
---

"""
LICENSE = "\nLicense and intended use: to be filled in by the publisher.\n"
CARD_TEXT = """# {name}, a VQ image tokenizer

{facts}

```python
from lgvq_plugin.checkpoints.pretrained import from_pretrained
host = from_pretrained('.')          # images (B, 3, H, W) in [-1, 1]
reconstruction = host(images)[0]
```
{table}"""
HEADS_CARD = """# LG-VQ's heads for `{target}` with codes of width {width}

They map the tokenizer's codes into the sentence space of the text encoder in `lgvq_config.json`.

```python
from lgvq_plugin import Handle
handle = Handle.from_pretrained(tokenizer, '.')
similarity = handle.encode_image(images) @ handle.encode_text(["a dog", "a cat"]).mT
```
"""


def from_pretrained(
    name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
) -> nn.Module:
    """Build the tokenizer of a folder written by :func:`save_pretrained`, in evaluation mode.

    `name` is the folder, or `organization/repository` on the Hugging Face hub. Raises ConfigError
    if there is no such folder or repository, or it contains no tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = download(str(name), revision)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} has no {CONFIG}; expected what save_pretrained wrote")
    return load_host(None, folder / WEIGHTS, device=device)


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    numbers: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tokenizer's folder, without its loss, discriminator and heads, and return it.

    Args:
        state_dict: state dict of the host.
        config: config with a `model:` section; its `data:` is named in the model card.
        folder: created if it does not exist.
        numbers: `{metric: {"value": v, "n": n, "unit": u}}` for the model card.
    """
    folder = Path(folder)
    _, tensors = split(state_dict, "loss.")
    write_safetensors(tensors, folder / WEIGHTS)
    model = dict(config["model"])
    model["params"] = {k: v for k, v in (model.get("params") or {}).items() if k != "ckpt_path"}
    write_json(folder / CONFIG, {"model": model, "lgvq_plugin": __version__})
    write_text(folder / CARD, model_card(tensors, config, numbers))
    return folder


def save_heads(checkpoint: Checkpoint, folder: str | Path) -> Path:
    """Write the heads of an LG-VQ checkpoint alone, as `Handle.save_pretrained` does.

    Raises ConfigError if it has none, or one of their weights is not finite.
    """
    saved = heads_of(checkpoint)
    if saved is None:
        lacks = f"has no heads ({HEADS}*): it is not of an LG-VQ run"
        raise ConfigError(f"checkpoint {str(checkpoint.path)!r} {lacks}")
    target = ((checkpoint.config or {}).get("model") or {}).get("target") or "a tokenizer"
    card = HEADS_CARD.format(target=target, width=saved.code_dim)
    written = saved.write(folder)
    write_text(written / CARD, CARD_HEAD + card + LICENSE)
    return written


def heads_of(checkpoint: Checkpoint, *, averaged: bool = False) -> SavedHeads | None:
    """Return the heads in a checkpoint, averaged ones if there are any; None without heads."""
    state = dict(checkpoint.state_dict)
    if averaged and checkpoint.averaged is not None:
        state |= unflatten(checkpoint.averaged, state)
    tensors, _ = split(state, HEADS)
    if not tensors:
        return None
    return SavedHeads.from_state(tensors, _block(checkpoint.config), str(checkpoint.path))


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to the Hugging Face hub, with the token of `hf auth login`; return its URL.

    Raises ConfigError if huggingface_hub is not installed, or the upload failed.
    """
    left = f"the folder {str(folder)!r} is complete, try again when the hub can be reached"
    with hub_errors("--push needs", f"--push {repository!r} failed", f"; {left}"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to `path` atomically."""
    own = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    write_bytes(path, save(own))  # only their owner could read the files of save_file


def model_card(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], numbers: Mapping[str, Any] | None
) -> str:
    """Return the README of a tokenizer: its architecture, its training, how to load it."""
    target = str(config["model"]["target"])
    count = sum(value.numel() for value in tensors.values())
    block = _block(config)
    facts = [f"host: `{target}`, {count / 1e6:.2f} M values"]
    facts += [f"{name}: {value}" for name, value in sizes_of(tensors).items()]
    facts += [f"trained with: {'LG-VQ, ' + json.dumps(block) if block is not None else 'no LG-VQ'}"]
    train = ((config.get("data") or {}).get("train") or {}).get("target")
    facts += [f"data set: `{train}`"] if train else []
    rows = ["\n| metric | value | images |\n|---|---|---|"] if numbers else []
    for name, row in (numbers or {}).items():
        value = f"{row['value']:.4g} {row.get('unit') or ''}"
        rows.append(f"| {name} | {value} | {row.get('n', '')} |")
    card = CARD_TEXT.format(
        name=target.rpartition(".")[2],
        facts="\n".join(f"- {fact}" for fact in facts),
        table="".join(f"{row}\n" for row in rows),
    )
    return CARD_HEAD + card + LICENSE


def _block(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the `lgvq:` block of a loss of ours; None for another's."""
    config = config or {}
    loss = loss_section(config)
    target, has_block = str(loss.get("target")), "lgvq" in (loss.get("params") or {})
    is_known = has_block or "LGVQ" in target or ".over." in target
    return lgvq_block(config) if is_known and target.startswith("lgvq_plugin.") else None
