"""Load checkpoints of any age: safely read, compared with the host, loaded as a whole or refused.

file --read_raw--> content --sort_tensors--> Checkpoint --compare--> LoadReport --> host
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..finite import in_groups
from ..objectives import rename_old_heads
from ..sockets import ConfigError
from ..training.build import build_host
from ..training.config import LOSS_KEYS, read_config, to_plain
from . import find_checkpoint
from .layout import Layout, sort_tensors, unflatten
from .read import How, plain, read_raw

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
HEADS = "loss.lgvq."
STATE = "lgvq_training"  # key of our trainer's state: the config, the position in the data


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Layout):
    """A checkpoint's weights on the CPU, and what else the file contains.

    Args:
        path: the file.
        config: the run's config in plain containers, if the file or its folder has it.
        how: safetensors, weights_only, allow_list (with stand-ins for old Lightning's classes) or
            pickle.
        step: number of updates, if the file has it.
    """

    path: Path
    config: dict[str, Any] | None = None
    how: How = "weights_only"
    step: int | None = None

    def require_config(self) -> dict[str, Any]:
        """Return the config; raises ConfigError if there is none."""
        if self.config is None:
            raise ConfigError(
                f"checkpoint {str(self.path)!r} has no config, nor is there a configs/ folder "
                "beside it; give -b CONFIG"
            )
        return self.config


def load_checkpoint(
    path: str | Path, trust_pickle: bool = False, *, root: str | None = None
) -> Checkpoint:
    """Read a checkpoint: a .safetensors file, a .ckpt/.pt/.pth, a run or `save_pretrained` folder.

    No code in the file is run. Classes that old Lightning and OmegaConf wrote get inert stand-ins;
    anything else is refused unless `trust_pickle`.

    Args:
        path: the file or the folder.
        trust_pickle: unpickle fully if nothing else works; that can run any code.
        root: key of the state dict; None tries state_dict, model, vae, ema.

    Raises ConfigError if there is no such file, it is damaged, has no tensors, or needs trust.
    """
    file = find_checkpoint(path)
    try:
        raw, how = read_raw(file, trust_pickle=trust_pickle)
    except ConfigError as error:
        older = [p for p in sorted(file.parent.glob("step=*.ckpt")) if not p.samefile(file)]
        if not older:
            raise
        raise ConfigError(f"{error}; the checkpoint before it is {str(older[-1])!r}") from error
    try:
        layout = sort_tensors(raw, root=root)
    except ConfigError as error:
        raise ConfigError(f"checkpoint {str(file)!r}: {error}") from error
    rename_old_heads(layout.state_dict)
    step = raw.get("global_step") if isinstance(raw, Mapping) else None
    return Checkpoint(
        **vars(layout),
        path=file,
        config=_config_in(raw) or _config_beside(file),
        how=how,
        step=int(step) if isinstance(step, int) else None,
    )


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
        with_loss: build the loss as well (taming's downloads VGG16), heads included; otherwise
            `host.loss` is a placeholder.

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
    optional: Sequence[str] = ("loss.",),
    averaged: bool = False,
) -> "LoadReport":
    """Load a checkpoint into a host, after comparing all keys and shapes.

    Args:
        host: takes the weights; if something does not fit, it is unchanged.
        checkpoint: from :func:`load_checkpoint`.
        params: `model.params` of the host's config, compared with the tensors' sizes.
        optional: prefixes of keys that may be missing, unexpected or of another shape.
        averaged: take averaged weights if there are any.

    Returns:
        What was loaded and what was not, optional keys and heads included.

    Raises ConfigError if a key that is not optional is missing, unexpected or of another shape, if
    weights are NaN, or if the host did not take them.
    """
    wanted = host.state_dict()
    given = dict(checkpoint.state_dict)
    if averaged and checkpoint.averaged is not None:
        given |= unflatten(checkpoint.averaged, given)
    if not set(given) & set(wanted):  # perhaps a flattened average alone
        given = unflatten(given, wanted) or given
    given |= {key: value for key, value in checkpoint.aside.items() if key in wanted}
    translate = getattr(host, "translate", None)  # of a host that reads foreign key names
    given = translate(given) if translate is not None else given
    report = compare(wanted, given, params)
    keys = (*report.missing, *report.unexpected, *(key for key, _, _ in report.mismatched))
    if not report.loaded or not all(key.startswith(tuple(optional)) for key in keys):
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} does not fit {type(host).__name__}; nothing "
            f"was loaded. {report}"
        )
    nans = [key for key in report.loaded if given[key].isnan().any()]
    if nans:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} is of a run that diverged: NaN in "
            f"{in_groups(nans)}; take an older one"
        )
    host.load_state_dict({key: given[key] for key in report.loaded}, strict=False)
    after = host.state_dict()
    for key in report.loaded:
        if not torch.equal(after[key].cpu(), given[key].to(after[key].dtype).cpu()):
            raise ConfigError(f"{type(host).__name__} did not take {key!r} from the checkpoint")
    return report


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint fit a host.

    Args:
        loaded: keys that the host takes.
        missing: keys of the host that the checkpoint lacks.
        unexpected: keys of the checkpoint that the host lacks.
        mismatched: (key, shape in the checkpoint, shape in the host).
        heads: keys of LG-VQ's heads that the host has no place for.
        new_heads: keys of heads that the host has and the checkpoint lacks.
        differences: messages about sizes in the config that contradict the tensors.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    heads: tuple[str, ...] = ()
    new_heads: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

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
        if self.heads:
            lines.append(f"  {len(self.heads)} of LG-VQ's heads, left out")
        if self.new_heads:
            lines.append(f"  {len(self.new_heads)} of LG-VQ's heads, newly initialized")
        return "\n".join(lines)


def compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> LoadReport:
    """Compare a checkpoint's tensors with a host's; nothing is loaded.

    Args:
        wanted: the host's state dict.
        given: the checkpoint's.
        params: params of the host's config, compared with the sizes of the tensors.
    """
    shared = [key for key in given if key in wanted]
    wrong = [key for key in shared if given[key].shape != wanted[key].shape]
    strange = [key for key in given if key not in wanted]
    lacking = [key for key in wanted if key not in given]
    return LoadReport(
        loaded=tuple(key for key in shared if key not in set(wrong)),
        missing=tuple(key for key in lacking if not key.startswith(HEADS)),
        unexpected=tuple(key for key in strange if not key.startswith(HEADS)),
        mismatched=tuple((k, tuple(given[k].shape), tuple(wanted[k].shape)) for k in wrong),
        heads=tuple(key for key in strange if key.startswith(HEADS)),
        new_heads=tuple(key for key in lacking if key.startswith(HEADS)),
        differences=differences(params or {}, given),
    )


def differences(params: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a message for each size in a host's `params` that contradicts the tensors.

    >>> import torch
    >>> differences({"n_embed": 8}, {"quantize.embedding.weight": torch.zeros(16, 4)})
    ('n_embed is 8 in the config, 16 in the checkpoint: model.params.n_embed=16',)
    """
    found = []
    sizes = sizes_of(state_dict)
    for path, value in _leaves(params):
        name = path[-1]
        if name not in sizes or path[0] in LOSS_KEYS:
            continue
        given = list(value) if isinstance(value, list | tuple) else value
        if given != sizes[name]:
            override = f"{'.'.join(path)}={sizes[name]}".replace(" ", "")
            found.append(
                f"{name} is {given} in the config, {sizes[name]} in the checkpoint: "
                f"model.params.{override}"
            )
    return tuple(found)


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, (*path, str(key)))


def sizes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive a taming-style tokenizer's sizes from its tensors, as far as possible.

    Returns:
        Some of n_embed, embed_dim, z_channels, ch, ch_mult, num_res_blocks, in_channels, out_ch.

    >>> import torch
    >>> sizes_of({"quantize.embedding.weight": torch.zeros(16, 4)})
    {'n_embed': 16, 'embed_dim': 4}
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    sizes: dict[str, Any] = {}
    codebooks = [f"{name}.weight" for name in ("quantize.embedding", "quantize.embed",
                                               "quantizer.embedding")]  # fmt: skip
    codebook = next((name for name in codebooks if len(shapes.get(name, ())) == 2), None)
    if codebook is not None:
        sizes["n_embed"], sizes["embed_dim"] = shapes[codebook]
    if len(shapes.get("quant_conv.weight", ())) == 4:
        embed_dim, sizes["z_channels"] = shapes["quant_conv.weight"][:2]
        if codebook != "quantize.embed.weight":  # Gumbel's projects to n_embed by itself
            sizes["embed_dim"] = embed_dim
    conv_in = shapes.get("encoder.conv_in.weight", ())
    if len(conv_in) == 4:
        sizes["ch"], sizes["in_channels"] = conv_in[:2]
        sizes |= _levels(shapes, conv_in[0])
        if len(shapes.get("decoder.conv_out.weight", ())) == 4:
            sizes["out_ch"] = shapes["decoder.conv_out.weight"][0]
    return sizes


def _levels(shapes: Mapping[str, Shape], ch: int) -> dict[str, Any]:
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    blocks = {(int(m[1]), int(m[2])): shapes[m[0]][0] for m in map(pattern.fullmatch, shapes) if m}
    if not blocks:
        return {}
    levels = 1 + max(level for level, _ in blocks)
    widths = [blocks.get((level, 0), 0) / ch for level in range(levels)]
    return {
        "ch_mult": [int(width) if width == int(width) else width for width in widths],
        "num_res_blocks": 1 + max(block for level, block in blocks if level == 0),
    }


def _model_section(config: DictConfig | Mapping[str, Any], *, with_loss: bool) -> dict[str, Any]:
    """Return the config's `model:` section in plain containers, without initial weights."""
    if config.get("model") is None:
        raise ConfigError(f"the config has no section `model:`; it has {list(config)}")
    model = dict(to_plain(config, "model")["model"])
    params = {k: v for k, v in (model.get("params") or {}).items() if k != "ckpt_path"}
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
            try:
                config = read_config([path]) if path.is_file() else DictConfig({})
            except ConfigError:  # of another program
                continue
            if "model" in config:
                return plain_or_model(config)
    return None


def plain_or_model(config: DictConfig) -> dict[str, Any]:
    """Return the config in plain containers, or its model alone if its data is still ???."""
    try:
        return to_plain(config)
    except ConfigError:
        return to_plain(config, "model")
