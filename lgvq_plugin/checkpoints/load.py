"""What a state dict tells of its model's sizes, held against a config and a host."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..finite import in_groups
from ..objectives import rename_old_heads
from ..sockets import ConfigError
from ..training.build import LOSS_KEYS, build_host, read_config, to_plain
from . import find_checkpoint
from .layout import sort_tensors, unflatten
from .read import How, plain, read_raw

Shape = tuple[int, ...]
HEADS = "loss.lgvq."


@dataclass(frozen=True)
class LoadReport:
    """What went into a host, and what did not.

    Args:
        loaded: keys that the host took.
        missing: keys of the host that the checkpoint lacks.
        unexpected: keys of the checkpoint that the host lacks.
        mismatched: (key, shape in the checkpoint, shape in the host).
        heads: keys of our own heads that the host has no place for.
        new_heads: keys of heads that the host has and the checkpoint lacks.
        differences: sizes in the config that the tensors contradict, in words.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    heads: tuple[str, ...] = ()
    new_heads: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether host and checkpoint have the same keys and shapes, heads aside."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors fit"]
        lines += [f"  {difference}" for difference in self.differences]
        lines += _listed("missing in the checkpoint", self.missing)
        lines += _listed("unexpected in the checkpoint", self.unexpected)
        shapes = [f"{key}: {then} then, {now} now" for key, then, now in self.mismatched]
        lines += _listed("of another shape", shapes)
        if self.heads:
            lines.append(f"  {len(self.heads)} of LG-VQ's heads, left out")
        if self.new_heads:
            lines.append(f"  {len(self.new_heads)} of LG-VQ's heads start anew")
        return "\n".join(lines)


def _listed(what: str, keys: Sequence[str], most: int = 12) -> list[str]:
    if not keys:
        return []
    more = [f"    ... and {len(keys) - most} more"] if len(keys) > most else []
    return [f"  {len(keys)} {what}:", *[f"    {key}" for key in keys[:most]], *more]


def sizes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a taming-style tokenizer's sizes off its tensors; what cannot be told is left out.

    Returns:
        Some of n_embed, embed_dim, z_channels, ch, ch_mult, num_res_blocks, in_channels, out_ch,
        channels.

    Example:
        >>> import torch
        >>> sizes_of({"quantize.embedding.weight": torch.zeros(16, 4)})
        {'n_embed': 16, 'embed_dim': 4}
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    sizes: dict[str, Any] = {}
    for name in (
        "quantize.embedding.weight",
        "quantize.embed.weight",
        "quantizer.embedding.weight",
    ):
        if len(shapes.get(name, ())) == 2:
            sizes["n_embed"], sizes["embed_dim"] = shapes[name]
            break
    if len(shapes.get("quant_conv.weight", ())) == 4:
        embed_dim, width = shapes["quant_conv.weight"][:2]
        if not name.startswith("quantize.embed."):  # Gumbel's projects to n_embed by itself
            sizes["embed_dim"] = embed_dim
        sizes["z_channels"] = width
    ch = shapes.get("encoder.conv_in.weight")
    if ch and len(ch) == 4:
        sizes["ch"], sizes["in_channels"] = ch[:2]
        sizes |= _levels(shapes, ch[0])
    if len(shapes.get("decoder.conv_out.weight", ())) == 4 and ch:
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


def differences(params: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return, in words, where a host's `params` say other sizes than the tensors have.

    Example:
        >>> import torch
        >>> differences({"n_embed": 8}, {"quantize.embedding.weight": torch.zeros(16, 4)})
        ('n_embed is 8 in the config, 16 in the checkpoint: model.params.n_embed=16',)
    """
    found = []
    sizes = sizes_of(state_dict)
    for path, value in _leaves(params):
        name = path[-1]
        if name not in sizes or path[0] in ("lossconfig", "loss"):
            continue
        given = list(value) if isinstance(value, list | tuple) else value
        if given != sizes[name]:
            key = ".".join(("model", "params", *path))
            told = str(sizes[name]).replace(" ", "")
            found.append(
                f"{name} is {given} in the config, {sizes[name]} in the checkpoint: {key}={told}"
            )
    return tuple(found)


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, (*path, str(key)))


def compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> LoadReport:
    """Hold a checkpoint's tensors against a host's; nothing is loaded.

    Args:
        wanted: the host's state dict.
        given: the checkpoint's.
        params: of the host's config, compared with the sizes that the tensors tell.
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


# -- Checkpoints of any age: read safely, compared with the host, loaded whole or not at all -----


__all__ = ["Checkpoint", "LoadReport", "load_checkpoint", "load_host", "load_into"]

logger = logging.getLogger(__name__)
STATE = "lgvq_training"  # what training/ keeps there: the config, the place in the data
NO_LOSS = {"target": "torch.nn.Identity"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's weights, and what it says of itself.

    Args:
        path: of the file.
        state_dict: the host's tensors on the CPU, prefixes taken off.
        config: the run's config in plain containers, if the file or its folder tells.
        averaged: averaged (EMA) weights by the same names, or None.
        aside: tensors that belong to no host, by their own names.
        how: safetensors, weights_only, allow_list (old Lightning's classes stood in for) or pickle.
        root: the key that held the state dict, "" if none.
        prefix: what was taken off the names.
        step: updates so far, if the file tells.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None = None
    averaged: dict[str, Tensor] | None = None
    aside: dict[str, Tensor] = field(default_factory=dict)
    how: How = "weights_only"
    root: str = ""
    prefix: str = ""
    step: int | None = None


def load_checkpoint(
    path: str | Path, trust_pickle: bool = False, *, root: str | None = None
) -> Checkpoint:
    """Read a checkpoint: a .safetensors file, a .ckpt/.pt/.pth, a run or `save_pretrained` folder.

    Nothing that lies in the file is run. Names of classes that old Lightning and OmegaConf wrote
    get inert stand-ins; anything else is refused unless `trust_pickle`.

    Args:
        path: of the file or the folder.
        trust_pickle: unpickle fully where nothing less helps; that can run any code.
        root: key of the state dict; None tries state_dict, model, vae, ema.

    Raises:
        ConfigError: if there is no such file, it is damaged, holds no tensors, or wants trust.
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
        path=file,
        state_dict=layout.state_dict,
        config=_config_in(raw) or _config_beside(file),
        averaged=layout.averaged,
        aside=layout.aside,
        how=how,
        root=layout.root,
        prefix=layout.prefix,
        step=int(step) if isinstance(step, int) else None,
    )


def load_into(
    host: nn.Module,
    checkpoint: Checkpoint,
    *,
    params: Mapping[str, Any] | None = None,
    optional: Sequence[str] = ("loss.",),
    averaged: bool = False,
) -> LoadReport:
    """Load a checkpoint into a host, after comparing all keys and shapes.

    Args:
        host: takes the weights; where something does not fit, it is left as it was.
        checkpoint: from :func:`load_checkpoint`.
        params: `model.params` of the host's config, compared with the tensors' sizes.
        optional: keys that start so may be missing, left over or of another shape.
        averaged: take the averaged weights where there are any.

    Returns:
        What was loaded and what was not, optional keys and heads included.

    Raises:
        ConfigError: if a key that is not optional is missing, left over or of another shape, or
            the host did not take what it was given.
    """
    wanted = host.state_dict()
    given = _tensors_for(wanted, checkpoint, averaged)
    translate = getattr(host, "translate", None)  # a host that knows files of other key names
    given = translate(given) if translate is not None else given
    report = compare(wanted, given, params)
    firm = tuple(optional)
    bad = [key for key in (*report.missing, *report.unexpected) if not key.startswith(firm)]
    bad += [key for key, _, _ in report.mismatched if not key.startswith(firm)]
    if bad or not report.loaded:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} does not fit {type(host).__name__}; nothing "
            f"was loaded. {report}"
        )
    poisoned = [key for key in report.loaded if given[key].isnan().any()]
    if poisoned:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} is of a run that diverged: NaN in "
            f"{in_groups(poisoned)}; take an older one"
        )
    host.load_state_dict({key: given[key] for key in report.loaded}, strict=False)
    after = host.state_dict()
    for key in report.loaded:
        if not torch.equal(after[key].cpu(), given[key].to(after[key].dtype).cpu()):
            raise ConfigError(f"{type(host).__name__} did not take {key!r} from the checkpoint")
    return report


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
        config: sections as in training, or the path of a YAML file; None: the config that the
            checkpoint or its run folder keeps.
        ckpt: path of the checkpoint, or one that is read already.
        device: where the host shall lie.
        trust_pickle: see :func:`load_checkpoint`.
        averaged: take averaged weights where there are any.
        with_loss: build the loss too (taming's downloads VGG16), heads included; without it a
            placeholder stands in `host.loss`.

    Raises:
        ConfigError: if there is no config, or the checkpoint does not fit it.
    """
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else load_checkpoint(ckpt, trust_pickle)
    if isinstance(config, str | Path):
        config = read_config([config])
    if config is None:
        if checkpoint.config is None:
            raise ConfigError(
                f"checkpoint {str(checkpoint.path)!r} tells no config, nor does a configs/ folder "
                "beside it; give one with -b CONFIG"
            )
        config = checkpoint.config
    model = model_of(config, with_loss=with_loss)
    host = build_host({"model": model})
    report = load_into(host, checkpoint, params=model.get("params"), averaged=averaged)
    for difference in report.differences:
        logger.warning("%s: %s", checkpoint.path, difference)
    return host.eval().to(device)


def model_of(config: DictConfig | Mapping[str, Any], *, with_loss: bool = True) -> dict[str, Any]:
    """Return the config's `model:` section in plain containers, without weights to start from."""
    section = config.get("model")
    if section is None:
        raise ConfigError(f"the config has no section `model:`; it has {list(config)}")
    model = dict(to_plain(config, "model")["model"])
    params = {k: v for k, v in (model.get("params") or {}).items() if k != "ckpt_path"}
    for key in LOSS_KEYS:
        if not with_loss and isinstance(params.get(key), Mapping):
            params[key] = dict(NO_LOSS)
    if model.get("learning_rate") is None and model.get("base_learning_rate") is None:
        model["learning_rate"] = 1e-4  # not needed to load weights, but a section must have one
    return {**model, "params": params}


def _tensors_for(
    wanted: Mapping[str, Tensor], checkpoint: Checkpoint, averaged: bool
) -> dict[str, Tensor]:
    given = dict(checkpoint.state_dict)
    if averaged and checkpoint.averaged is not None:
        given |= unflatten(checkpoint.averaged, given)
    if not set(given) & set(wanted):  # nothing but a flattened average, perhaps
        given = unflatten(given, wanted) or given
    beside = {key: value for key, value in checkpoint.aside.items() if key in wanted}
    return {**given, **beside}


def _config_in(raw: Any) -> dict[str, Any] | None:
    kept = raw.get(STATE) if isinstance(raw, Mapping) else None
    config = kept.get("config") if isinstance(kept, Mapping) else None
    return plain(config) if isinstance(config, Mapping) and "model" in config else None


def _config_beside(file: Path) -> dict[str, Any] | None:
    """Look where our runs and taming's keep a config, and `save_pretrained` folders."""
    for run in (file.parent, file.parent.parent):
        projects = sorted(run.glob("configs/*-project.yaml"), reverse=True)
        for path in (run / "config.json", run / "configs" / "merged.yaml", *projects):
            try:
                config = read_config([path]) if path.is_file() else {}
            except ConfigError:  # another program's
                continue
            if "model" in config:
                try:
                    return to_plain(config)
                except ConfigError:  # data that is still ??? does not matter here
                    return to_plain(config, "model")
    return None
