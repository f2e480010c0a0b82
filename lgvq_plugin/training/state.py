"""Checkpoint files: written atomically, and checked before a run resumes from them."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..checkpoints.read import read_raw
from ..config import FIRST_RECIPE, differing, laid_over, of_first_version
from ..files import replacing
from ..functional import all_finite
from ..objectives import complete_old_heads
from ..sockets import ConfigError
from .config import OURS, lgvq_block, loss_key, loss_section

LAST = "last.ckpt"
STATE = "lgvq_training"  # our own entry of a checkpoint
RATIO = "gradient_ratio"  # of the last step, which the next one logs
BATCHES = "batches"  # Alignment.batches
VERSION_OF_DEFAULTS = "defaults"  # see config.DEFAULTS; runs of version 0.1 lack it
EXPECTED: dict[str, Any] = {  # an example of a checkpoint, see `require_like`
    "state_dict": {},
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "global_step": 0,
    "epoch": 0,
    "pytorch-lightning_version": "",
    STATE: {"samples": 0, "generators": list, "config": {}},
}
OPTIONAL: dict[str, Any] = {"ema_state_dict": {}, "MixedPrecision": {}}
VERSION = re.compile(r"([2-9]|\d{2,})(\.\d+)+((a|b|rc|\.post|\.?dev)\d+)?")  # of Lightning
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # shaped as the parameter
RANGES = {  # settings of a parameter group and what must be below or equal to: torch's own limits
    "lr": ("learning rate", math.inf),
    "betas": ("beta parameter", 1.0),
    "eps": ("epsilon value", math.inf),
    "weight_decay": ("weight_decay value", math.inf),
    "momentum": ("momentum value", math.inf),
}


class CheckpointError(ConfigError):
    """A checkpoint cannot be resumed; `--resume auto` then tries the one before it."""


class Unfit(Exception):
    """Says what is wrong in a checkpoint; :func:`checking` adds which one it is."""


@contextmanager
def checking(path: Path | str) -> Iterator[None]:
    """Turn :class:`Unfit` into a CheckpointError that names the checkpoint at `path`."""
    try:
        yield
    except Unfit as problem:
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be resumed: {problem}; the file was damaged or "
            "changed after it was written, resume from another"
        ) from problem.__cause__


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file and renames it, so that a kill leaves the old or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with replacing(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)  # an open file, so that the system's error is kept
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read `path` to the CPU without running code from it."""
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """Return the checkpoint at `path`.

    Raises CheckpointError if it does not exist, is damaged, was not written by `lgvq train`, or an
    entry is missing or of another type.
    """
    try:
        raw, _ = read_raw(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(raw, Mapping) or STATE not in raw:
        has_optimizers = isinstance(raw, Mapping) and "optimizer_states" in raw
        kind = "is another trainer's" if has_optimizers else "holds no optimizers"
        raise CheckpointError(
            f"checkpoint {str(path)!r} {kind}: only a checkpoint of `lgvq train` can be resumed; "
            f"to start from its weights: lgvq retrofit -b CONFIG --ckpt {path} -o DIR"
        )
    with checking(path):
        for key, example in {**EXPECTED, **OPTIONAL}.items():
            if key in raw or key in EXPECTED:
                require_like(raw.get(key), example, key)
        samples, version = raw[STATE]["samples"], raw["pytorch-lightning_version"]
        if not (isinstance(samples, int) and 0 <= samples < 2**63):
            raise Unfit(f"{STATE}.samples is {samples!r}")
        if not raw[STATE]["generators"]:
            raise Unfit(f"{STATE}.generators has 0 entries")
        if not VERSION.fullmatch(version):
            raise Unfit(f"pytorch-lightning_version is {version!r}")
    return dict(raw)


def require_like(given: Any, example: Any, where: str) -> None:
    """Raise Unfit unless a part of a checkpoint has the entries, types and shapes of an example.

    The example's keys must all be in `given`; a list must have its length, a tensor its shape and
    kind, and finite values if the example's are. `list` is any list of mappings, None is anything.

    >>> require_like({"step": "two"}, {"step": 1}, "loops")
    Traceback (most recent call last):
    ...
    lgvq_plugin.training.state.Unfit: loops.step is of type str, expected int
    """
    if example is None:
        return
    if given is None:
        raise Unfit(f"{where} is missing")
    if example is list:
        example = [{}] * len(given) if isinstance(given, list) else []
    if isinstance(example, Tensor):
        _require_tensor(given, example, where)
    elif isinstance(example, Mapping) and isinstance(given, Mapping):
        for key, value in example.items():
            require_like(given.get(key), value, f"{where}.{key}")
    elif isinstance(example, list | tuple) and isinstance(given, list | tuple):
        if len(given) != len(example):
            raise Unfit(f"{where} has {len(given)} entries, expected {len(example)}")
        for i, value in enumerate(example):
            require_like(given[i], value, f"{where}[{i}]")
    elif not (_is_number(given) if _is_number(example) else type(given) is type(example)):
        raise Unfit(f"{where} is of type {type(given).__name__}, expected {type(example).__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_tensor(given: Any, example: Tensor, where: str) -> None:
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_meta:
        kind = getattr(given, "layout", type(given).__name__)
        raise Unfit(f"{where} is of type {kind}, expected a dense tensor")
    if given.shape != example.shape:
        raise Unfit(f"{where} is {tuple(given.shape)}, the host's {tuple(example.shape)}")
    if given.is_floating_point() != example.is_floating_point() or given.is_complex():
        raise Unfit(f"{where} is of {given.dtype}, the host's of {example.dtype}")
    if not all_finite([given]) and all_finite([example]):  # masks may hold -inf from the start
        raise Unfit(f"{where} holds NaN or inf: the run diverged")


def require_fit(given: Any, host: nn.Module, where: str) -> None:
    """Raise Unfit unless a state dict, or its EMA weights, has the host's keys, shapes and kinds.

    Keys of heads of earlier versions are renamed in `given`, which is loaded next.
    """
    if isinstance(given, dict):
        complete_old_heads(given)
    wanted = host.state_dict()
    require_like(given, wanted, where)
    if strange := given.keys() - wanted.keys():
        raise Unfit(f"{where}.{min(strange)} is not {type(host).__name__}'s")


def require_optimizers(
    checkpoint: Mapping[str, Any], optimizers: list[Optimizer], schedulers: list[Any]
) -> None:
    """Raise Unfit unless the states of optimizers and of schedulers fit those of the host."""
    states, saved = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    require_like(states, [{"state": {}}] * len(optimizers), "optimizer_states")
    counts = checkpoint[STATE].get("moments") or []  # older files have none
    for i, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
        where, found = f"optimizer_states[{i}]", len(state["state"])
        wanted = counts[i] if i < len(counts) else None
        if wanted is None and i == 0 and isinstance(optimizer, Adam) and not found:
            wanted = 1 if checkpoint["global_step"] else 0
        if wanted not in (None, found):
            raise Unfit(f"{where}.state has {found} entries, expected {wanted}")
        _require_optimizer(state, optimizer, where)
    require_like(saved, [{}] * len(schedulers), "lr_schedulers")
    for i, (state, scheduler) in enumerate(zip(saved, schedulers, strict=True)):
        like = _shared(scheduler.state_dict(), state)
        for key, value in like.items():  # lists by group: earlier versions had fewer groups
            if isinstance(value, list) and isinstance(state[key], list):
                like[key] = value[: max(1, len(state[key]))]
        require_like(state, like, f"lr_schedulers[{i}]")


def _require_optimizer(state: Mapping[str, Any], optimizer: Optimizer, where: str) -> None:
    at = f"{where}.param_groups"
    require_like(state.get("param_groups"), list, at)
    for group in state["param_groups"]:
        _require_group(group, at)
    require_like(state.get("state"), {}, f"{where}.state")
    for key, moments in state["state"].items():
        require_like(moments, {}, f"{where}.state[{key}]")
    for accept in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state = accept(optimizer, dict(state)) or state  # heads in other groups, or none
    groups, own = state["param_groups"], optimizer.param_groups
    if len(groups) == len(own):  # otherwise the optimizer itself reports it
        for i, (mine, group) in enumerate(zip(own, groups, strict=True)):
            like = _shared(mine, group) | {"params": [0] * len(mine["params"])}
            require_like(group, like, f"{at}[{i}]")
    parameters = [p for group in own for p in group["params"]]
    shapes = dict(zip_longest((n for group in groups for n in group["params"]), parameters))
    kept = {name for moments in state["state"].values() for name in moments}
    if kept and isinstance(optimizer, Adam):  # AdamW too
        kept |= {"step", *MOMENTS[:2]}
    for key, moments in state["state"].items():
        entry = f"{where}.state[{key}]"
        if missing := sorted(kept - moments.keys()):
            raise Unfit(f"{entry} has no {missing[0]}")
        parameter = shapes.get(key) if isinstance(key, int) else None
        if parameter is None or not all(_is_moment(*m, like=parameter) for m in moments.items()):
            raise Unfit(f"{entry} does not fit the host's parameter")


def _require_group(group: Mapping[str, Any], where: str) -> None:
    """Check a saved group's parameters, and its learning rate, betas and so on."""
    numbers = group["params"] if isinstance(group.get("params"), list) else [0]
    require_like(group, {"params": [0] * len(numbers), "lr": 0.0}, where)
    for key in RANGES.keys() & group.keys():
        name, limit = RANGES[key]
        values = group[key] if isinstance(group[key], list | tuple) else [group[key]]
        if not all(_is_number(value) and 0 <= value < limit for value in values):
            raise Unfit(f"{where}: Invalid {name}: {group[key]!r}")


def _is_moment(name: str, value: Any, *, like: Tensor) -> bool:
    """Whether an optimizer may keep `value` as `name` for a parameter."""
    if name == "momentum_buffer" and value is None:  # plain SGD
        return True
    if name in MOMENTS:
        is_like = isinstance(value, Tensor) and value.shape == like.shape
        is_dense = is_like and value.layout == torch.strided and not value.is_meta
        if not (is_dense and value.is_floating_point()):
            return False
        return bool(all_finite([value]) and (not name.endswith("_sq") or value.ge(0).all()))
    if isinstance(value, Tensor):
        is_step = value.numel() == 1 and not value.is_meta
        return name != "step" or bool(is_step and value.ge(0).all())
    return isinstance(value, int | float) and (name != "step" or value >= 0)


def _shared(example: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of `example` at keys of `given`: other versions have other keys."""
    plain = (bool, int, float, str, list, tuple)
    return {k: v for k, v in example.items() if k in given and isinstance(v, plain)}


def save(trainer: Any, folder: Path, step: int, keep: int | None) -> Path:
    """Save `step=....ckpt` and `last.ckpt` in `folder`, return the latter; called by all processes.

    The newest `keep` files of steps stay (None: all). Raises ConfigError if the disk is full;
    earlier checkpoints are unchanged then.
    """
    path = folder / f"step={step:08d}.ckpt"
    trainer.save_checkpoint(path, weights_only=False)  # False = optimizers too
    if trainer.is_global_zero:
        with replacing(folder / LAST) as part:
            try:
                os.link(path, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, part)
        steps = sorted(folder.glob("step=*.ckpt"))
        for stale in steps[:-keep] if keep is not None else []:
            stale.unlink()
    return folder / LAST


def candidates(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first."""
    last = run / "checkpoints" / LAST
    steps = sorted((run / "checkpoints").glob("step=*.ckpt"), reverse=True)
    return ([last] if last.is_file() else []) + steps


def first_recipe(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to lay over a config that resumes a run of version 0.1, with its old defaults.

    The run's own config gets the same, so that both can be compared; {} for another run.
    """
    kept = checkpoint[STATE]
    before, key = kept["config"], loss_key(config)
    then, now = lgvq_block(before), lgvq_block(config)
    if VERSION_OF_DEFAULTS not in kept:
        then = of_first_version(then)
    is_ours = str(loss_section(config).get("target")).startswith(OURS)
    is_default = now.get("recipe") in (None, "corrected")
    if not (is_ours and is_default and then.get("recipe") == FIRST_RECIPE):
        return {}
    above = {"model": {"params": {key: {"params": {"lgvq": {"recipe": FIRST_RECIPE}}}}}}
    kept["config"] = laid_over(before, above)
    return above


def check_config(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError, which names the keys, if a run's `model:` section is not the same."""
    before = checkpoint[STATE]["config"]
    differ = differing({"model": before.get("model")}, {"model": config.get("model")})
    if differ:
        raise ConfigError(
            f"checkpoint {str(path)!r} is of another config: {', '.join(differ[:5])}; resume with "
            "the config in the run's folder, or start a new run under another --name"
        )
