"""Load checkpoints of any age: safely read, compared with the host, loaded as a whole or refused.

file --read_raw--> content --sort_tensors--> Checkpoint --compare--> LoadReport --> host
"""

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..config import require
from ..functional import all_finite, in_groups
from ..objectives import rename_old_heads
from ..sockets import ConfigError, params_of
from ..training.build import build_host
from ..training.config import LOSS_KEYS, read_config, to_plain
from ..training.lora import merge
from . import find_checkpoint
from .read import How, Layout, plain, read_raw, sort_tensors, unflatten

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
HEADS = "loss.lgvq."
GUMBEL = "quantize.embed"
CODEBOOKS = ("quantize.embedding", GUMBEL, "quantizer.embedding")
STATE = "lgvq_training"  # key of our trainer's state: the config, the position in the data


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Layout):
    """A checkpoint's weights on the CPU, and what else the file contains."""

    path: Path
    """The file."""
    config: dict[str, Any] | None = None
    """The run's, in plain containers, if the file or its folder has it."""
    how: How = "weights_only"
    """How the file was read; allow_list: with stand-ins for old Lightning's classes."""
    step: int | None = None
    """Number of updates, if the file has it."""

    def require_config(self) -> dict[str, Any]:
        """Return the config; raises ConfigError if there is none."""
        if self.config is not None:
            return self.config
        lacks = "has no config, nor is there a configs/ folder beside it; give -b CONFIG"
        raise ConfigError(f"checkpoint {str(self.path)!r} {lacks}")


def load_checkpoint(
    path: str | Path, trust_pickle: bool = False, *, root: str | None = None
) -> Checkpoint:
    """Read a checkpoint: a .safetensors file, a .ckpt/.pt/.pth, a run or `save_pretrained` folder.

    No code in the file is run. Classes that old Lightning and OmegaConf wrote get inert stand-ins;
    anything else is refused, unless `trust_pickle` permits to run any code. The state dict is at
    `root`; None tries state_dict, model, vae, ema. Raises ConfigError if there is no such file, it
    is damaged, has no tensors, or needs trust.
    """
    file = find_checkpoint(path)
    try:
        raw, how = read_raw(file, trust_pickle=trust_pickle)
    except ConfigError as error:
        older = [p for p in sorted(file.parent.glob("step=*.ckpt")) if not p.samefile(file)]
        if not older:
            raise
        raise ConfigError(f"{error}; the checkpoint before it is {str(older[-1])!r}") from error
    config = _config_in(raw) or _config_beside(file)
    try:
        found = {**vars(sort_tensors(raw, root=root))}
        every = {**found["state_dict"], **(found["averaged"] or {}), **found["aside"]}
        for key, value in every.items():
            if value.layout != torch.strided or value.is_meta or value.is_complex():
                kind = "without values" if value.is_meta else f"{value.layout} {value.dtype}"
                expected = "expected a dense one of real numbers; save the state dict again"
                raise ConfigError(f"{key} is a tensor {kind}; {expected}")
        rename_old_heads(found["state_dict"])
        for kind in ("state_dict", "averaged"):
            found[kind] = found[kind] and merge(found[kind], config)
    except ConfigError as error:
        raise ConfigError(f"checkpoint {str(file)!r}: {error}") from error
    step = raw.get("global_step") if isinstance(raw, Mapping) else None
    step = int(step) if isinstance(step, int) else None
    return Checkpoint(**found, path=file, config=config, how=how, step=step)


def load_host(
    config: DictConfig | Mapping[str, Any] | str | Path | None,
    ckpt: str | Path | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    trust_pickle: bool = False,
    averaged: bool = False,
    with_loss: bool = False,
) -> nn.Module:
    """Build a config's host and load a checkpoint into it; in evaluation mode.

    Args:
        config: sections as in training, or the path of a YAML file; None: the config in the
            checkpoint or its run folder.
        ckpt: path of the checkpoint, or a loaded one.
        device: device of the host.
        trust_pickle: see :func:`load_checkpoint`.
        averaged: take averaged weights if there are any.
        with_loss: build the loss too (taming's downloads VGG16), with heads, not a placeholder.

    Raises ConfigError if there is no config, or the checkpoint does not fit it.
    """
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else load_checkpoint(ckpt, trust_pickle)
    if isinstance(config, str | Path):
        config = read_config([config])
    model = _model_section(config or checkpoint.require_config(), with_loss=with_loss)
    host = build_host({"model": model})
    report = load_into(host, checkpoint, params=model["params"], averaged=averaged)
    for difference in report.differences:
        logger.warning("%s: %s", checkpoint.path, difference)
    return host.eval().to(device)


def load_into(
    host: nn.Module,
    checkpoint: Checkpoint,
    *,
    params: Mapping[str, Any] | None = None,
    averaged: bool = False,
) -> "LoadReport":
    """Load a checkpoint into a host, and report what was loaded and what was not.

    The `params` of the host's config are compared with the tensors' sizes; keys of the loss may be
    missing, unexpected or of another shape. Averaged weights are taken if there are any and
    `averaged`. If something does not fit, the host is unchanged.

    Raises ConfigError if another key is missing, unexpected or of another shape, if weights are
    NaN, or if the host did not take them.
    """
    wanted = host.state_dict()
    given = dict(checkpoint.state_dict)
    if averaged and checkpoint.averaged is not None:
        given |= unflatten(checkpoint.averaged, given)
    if not set(given) & set(wanted):  # perhaps a flattened average alone
        given = unflatten(given, wanted) or given
    given |= {key: value for key, value in checkpoint.aside.items() if key in wanted}
    given = getattr(host, "translate", dict)(given)  # of a host that reads foreign key names
    report = compare(wanted, given, params)
    keys = (*report.missing, *report.unexpected, *(key for key, _, _ in report.mismatched))
    name, kind = f"checkpoint {str(checkpoint.path)!r}", type(host).__name__
    if not report.loaded or not all(key.startswith("loss.") for key in keys):
        raise ConfigError(f"{name} does not fit {kind}; nothing was loaded. {report}")
    if bad := [k for k in report.loaded if all_finite([wanted[k]]) and not all_finite([given[k]])]:
        kind = "NaN" if any(given[key].isnan().any() for key in bad) else "inf"
        diverged = f"is of a run that diverged: {kind} in {in_groups(bad)}; take an older one"
        raise ConfigError(f"{name} {diverged}")
    host.load_state_dict({key: given[key] for key in report.loaded}, strict=False)
    after = host.state_dict()
    for key in report.loaded:
        if not torch.equal(after[key].cpu(), given[key].to(after[key].dtype).cpu()):
            raise ConfigError(f"{kind} did not take {key!r} from the checkpoint")
    return report


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint fit a host."""

    loaded: tuple[str, ...]
    """Keys that the host takes."""
    missing: tuple[str, ...] = ()
    """Keys of the host that the checkpoint lacks."""
    unexpected: tuple[str, ...] = ()
    """Keys of the checkpoint that the host lacks."""
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    """(key, shape in the checkpoint, shape in the host)."""
    heads: tuple[str, ...] = ()
    """Keys of LG-VQ's heads that the host has no place for."""
    new_heads: tuple[str, ...] = ()
    """Keys of heads that the host has and the checkpoint lacks."""
    differences: tuple[str, ...] = ()
    """Messages about sizes in the config that contradict the tensors."""

    def __str__(self) -> str:
        shapes = [f"{key}: {then} then, {now} now" for key, then, now in self.mismatched]
        lines = [f"{len(self.loaded)} tensors fit", *(f"  {one}" for one in self.differences)]
        for what, keys in (
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("of another shape", shapes),
        ):
            lines += [f"  {len(keys)} {what}:"] if keys else []
            lines += [f"    {key}" for key in keys[:12]]
            lines += [f"    ... and {len(keys) - 12} more"] if len(keys) > 12 else []
        for fate, heads in (("left out", self.heads), ("newly initialized", self.new_heads)):
            lines += [f"  {len(heads)} of LG-VQ's heads, {fate}"] if heads else []
        return "\n".join(lines)


def compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> LoadReport:
    """Compare a checkpoint's tensors with a host's, and their sizes with its config's `params`."""
    shapes = {k: (tuple(given[k].shape), tuple(wanted[k].shape)) for k in given if k in wanted}
    wrong = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    unexpected, heads = _split(given.keys() - wanted.keys(), given)
    missing, new_heads = _split(wanted.keys() - given.keys(), wanted)
    return LoadReport(
        loaded=tuple(key for key in shapes if key not in wrong),
        missing=missing,
        unexpected=unexpected,
        mismatched=tuple((key, *pair) for key, pair in wrong.items()),
        heads=heads,
        new_heads=new_heads,
        differences=differences(params or {}, given),
    )


def _split(keys: set[str], order: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return some keys in order: those of the host, and those of heads."""
    listed = [key for key in order if key in keys]
    heads = tuple(key for key in listed if key.startswith(HEADS))
    return tuple(key for key in listed if key not in heads), heads


def differences(params: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a message for each size in a host's `params` that contradicts the tensors.

    >>> import torch
    >>> differences({"n_embed": 8}, {"quantize.embedding.weight": torch.zeros(16, 4)})
    ('n_embed is 8 in the config, 16 in the checkpoint: model.params.n_embed=16',)
    """
    found = []
    sizes = sizes_of(state_dict)
    for path, value in _leaves(params):
        name, given = path[-1], list(value) if isinstance(value, list | tuple) else value
        if name in sizes and path[0] not in LOSS_KEYS and given != sizes[name]:
            override = f"model.params.{'.'.join(path)}={sizes[name]}".replace(" ", "")
            sides = f"{name} is {given} in the config, {sizes[name]} in the checkpoint"
            found.append(f"{sides}: {override}")
    return tuple(found)


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, (*path, str(key)))


def sizes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive a taming-style tokenizer's sizes from its tensors, as far as possible.

    Some of n_embed, embed_dim, z_channels, ch, ch_mult, num_res_blocks, in_channels, out_ch.

    >>> import torch
    >>> sizes_of({"quantize.embedding.weight": torch.zeros(16, 4)})
    {'n_embed': 16, 'embed_dim': 4}
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    sizes: dict[str, Any] = {}

    def read(key: str, rank: int, *names: str | None) -> None:
        """Take the first sizes of a tensor of this rank under these names."""
        if len(shapes.get(key, ())) == rank:
            pairs = zip(names, shapes[key], strict=False)
            sizes.update({name: size for name, size in pairs if name is not None})

    codebook = next((name for name in CODEBOOKS if len(shapes.get(f"{name}.weight", ())) == 2), "")
    read(f"{codebook}.weight", 2, "n_embed", "embed_dim")
    # Gumbel's codebook (quantize.embed) projects to n_embed by itself.
    read("quant_conv.weight", 4, None if codebook == GUMBEL else "embed_dim", "z_channels")
    read("encoder.conv_in.weight", 4, "ch", "in_channels")
    if "ch" not in sizes:
        return sizes
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    blocks = {(int(m[1]), int(m[2])): shapes[m[0]][0] for m in map(pattern.fullmatch, shapes) if m}
    if blocks:
        levels = range(1 + max(level for level, _ in blocks))
        widths = [blocks.get((level, 0), 0) / sizes["ch"] for level in levels]
        sizes["ch_mult"] = [int(width) if width == int(width) else width for width in widths]
        sizes["num_res_blocks"] = 1 + max(block for level, block in blocks if level == 0)
    read("decoder.conv_out.weight", 4, "out_ch")
    return sizes


def _model_section(config: DictConfig | Mapping[str, Any], *, with_loss: bool) -> dict[str, Any]:
    """Return the config's `model:` section in plain containers, without initial weights."""
    if config.get("model") is None:
        raise ConfigError(f"the config has no section `model:`; it has {list(config)}")
    model = to_plain(config, "model")["model"]
    require(isinstance(model, Mapping), "model", "a mapping of target and params", model)
    params = {k: v for k, v in params_of(model, "model").items() if k != "ckpt_path"}
    for key in LOSS_KEYS:
        if not with_loss and isinstance(params.get(key), Mapping):
            params[key] = {"target": "torch.nn.Identity"}
    if model.get("learning_rate") is None and model.get("base_learning_rate") is None:
        model["learning_rate"] = 1e-4  # not needed to load weights, but a section must have one
    return {**model, "params": params}


def _config_in(raw: Any) -> dict[str, Any] | None:
    state = raw.get(STATE) if isinstance(raw, Mapping) else None
    config = state.get("config") if isinstance(state, Mapping) else None
    return plain(config) if isinstance(config, Mapping) and "model" in config else None


def _config_beside(file: Path) -> dict[str, Any] | None:
    """Search where our runs, taming's runs and `save_pretrained` folders keep a config."""
    for run in (file.parent, file.parent.parent):
        projects = sorted(run.glob("configs/*-project.yaml"), reverse=True)
        for path in (run / "config.json", run / "configs" / "merged.yaml", *projects):
            config = DictConfig({})
            with suppress(ConfigError):  # of another program
                config = read_config([path]) if path.is_file() else config
            if "model" in config:
                return plain_or_model(config)
    return None


def plain_or_model(config: DictConfig) -> dict[str, Any]:
    """Return the config in plain containers, or its model alone if its data is still ???."""
    try:
        return to_plain(config)
    except ConfigError:
        return to_plain(config, "model")
