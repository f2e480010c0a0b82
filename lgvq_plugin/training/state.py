"""Checkpoint files: written whole or not at all, finite, and checked before a run goes on."""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoints.read import read_raw
from ..config import differing
from ..files import replacing
from ..finite import all_finite, in_groups
from ..objectives import rename_old_heads
from ..sockets import ConfigError

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
STATE = "lgvq_training"  # our own entry of a checkpoint
TENSORS, ENTRIES = "a mapping of names to tensors", "a list of mappings"
EXPECTED: dict[str, Any] = {  # of a checkpoint to resume from
    "state_dict": TENSORS,
    "optimizer_states": ENTRIES,
    "lr_schedulers": ENTRIES,
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "global_step": 0,
    "epoch": 0,
    "pytorch-lightning_version": "",
    STATE: {"samples": 0, "generators": ENTRIES, "config": {}},
}
OPTIONAL: dict[str, Any] = {"ema_state_dict": TENSORS, "MixedPrecision": {}}
VERSION = re.compile(r"([2-9]|\d{2,})(\.\d+)+((a|b|rc|\.post|\.?dev)\d+)?")  # of Lightning
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # shaped as the parameter


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves beside the target and renames, so that a kill leaves the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with replacing(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)  # an open file, so that the system's error is kept
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read `path`, on the CPU, refusing anything that could run code."""
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """Return the checkpoint at `path`.

    Raises:
        ConfigError: if there is none, it is damaged, was not written by `lgvq train`, an entry is
            missing or of another type, or its weights are NaN.
    """
    raw, _ = read_raw(path)
    if not isinstance(raw, Mapping) or STATE not in raw:
        has_optimizers = isinstance(raw, Mapping) and "optimizer_states" in raw
        kind = "is another trainer's" if has_optimizers else "holds no optimizers"
        raise ConfigError(
            f"checkpoint {str(path)!r} {kind}: only a checkpoint of `lgvq train` can be resumed; "
            f"to start from its weights: lgvq retrofit -b CONFIG --ckpt {path} -o DIR"
        )
    for key, expected in {**EXPECTED, **{k: v for k, v in OPTIONAL.items() if k in raw}}.items():
        require_like(raw.get(key), expected, key, path)
    samples, version = raw[STATE]["samples"], raw["pytorch-lightning_version"]
    is_count = isinstance(samples, int) and samples >= 0
    is_known = VERSION.fullmatch(version)
    if not (is_count and raw[STATE]["generators"] and is_known):
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be resumed: {STATE}.samples is {samples!r}, "
            f"{STATE}.generators has {len(raw[STATE]['generators'])} entries, "
            f"pytorch-lightning_version is {version!r}; the file was changed, resume from another"
        )
    bad = [key for key, value in raw["state_dict"].items() if value.isnan().any()]
    if bad:
        raise ConfigError(
            f"checkpoint {str(path)!r} is of a run that diverged: NaN in {in_groups(bad)}; resume "
            "from an older one"
        )
    return dict(raw)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def require_like(given: Any, expected: Any, where: str, path: Path | str) -> None:
    """Check that a part of a checkpoint has the entries and the types of an example.

    Args:
        given: the part.
        expected: TENSORS, ENTRIES, or an example: a mapping's keys must all be in `given`; None
            is like anything.
        where: name of the part, for the message.
        path: of the checkpoint, for the message.

    Raises:
        ConfigError: if it has not.

    Example:
        >>> require_like({"step": "two"}, {"step": 1}, "loops", "last.ckpt")
        Traceback (most recent call last):
        ...
        lgvq_plugin.sockets.ConfigError: checkpoint 'last.ckpt' cannot be resumed: loops.step is ...
    """
    kind: Any = type(expected)
    if expected is TENSORS:
        good = isinstance(given, Mapping) and given and all(
            isinstance(k, str) and isinstance(v, Tensor) and _is_dense(v) for k, v in given.items()
        )  # fmt: skip
    elif expected is ENTRIES:
        good = isinstance(given, list | tuple) and all(isinstance(e, Mapping) for e in given)
    elif isinstance(expected, Mapping):
        good, kind = isinstance(given, Mapping), "a mapping"
    elif isinstance(expected, bool):
        good = isinstance(given, bool)
    elif isinstance(expected, int | float):
        good = isinstance(given, int | float) and not isinstance(given, bool)
    elif isinstance(expected, list | tuple):
        good = isinstance(given, list | tuple) and len(given) == len(expected)
        kind = f"a list of {len(expected)}"
    else:
        good = expected is None or isinstance(given, kind)
    if not good:
        wanted = expected if expected is TENSORS or expected is ENTRIES else kind
        wanted = wanted if isinstance(wanted, str) else f"type {wanted.__name__}"
        found = "missing" if given is None else f"of type {type(given).__name__}"
        found += " with other entries" if isinstance(given, Mapping | list | tuple) else ""
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be resumed: {where} is {found}, expected "
            f"{wanted}; the file was changed after it was written, resume from another"
        )
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            require_like(given.get(key), value, f"{where}.{key}", path)
    elif isinstance(expected, list | tuple):
        for i, value in enumerate(expected):
            require_like(given[i], value, f"{where}[{i}]", path)


def require_fit(given: Mapping[str, Tensor], host: nn.Module, where: str, path: str) -> None:
    """Check that a checkpoint's state dict, or its averages, has the host's keys and shapes.

    Raises:
        ConfigError: if it has not; it names the keys.
    """
    rename_old_heads(given)  # type: ignore[arg-type]  # in place: this is what is loaded next
    wanted = host.state_dict()
    bad = [f"{key} is missing" for key in wanted if key not in given]
    bad += [f"{key} is not the host's" for key in given if key not in wanted]
    bad += [
        f"{key} is {tuple(given[key].shape)}, the host's {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    bad += [
        f"{key} is of {given[key].dtype}, the host's of {value.dtype}"
        for key, value in wanted.items()
        if key in given and given[key].is_floating_point() != value.is_floating_point()
    ]
    bad += [
        f"{key} is infinite"
        for key, _ in host.named_parameters()
        if key in given and not all_finite([given[key]])
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ConfigError(
            f"checkpoint {path!r}: its {where} does not fit {type(host).__name__}: "
            f"{'; '.join(bad[:3])}{more}; resume from another"
        )


def require_optimizers(
    given: list[Mapping[str, Any]],
    optimizers: list[Optimizer],
    schedulers: list[Any],
    saved: Any,
    path: str,
) -> None:
    """Check that saved states of optimizers and of schedulers fit those of the host.

    Raises:
        ConfigError: if they do not.
    """
    require_like(given, [{}] * len(optimizers), "optimizer_states", path)
    require_like(saved, [{}] * len(schedulers), "lr_schedulers", path)
    for i, (state, optimizer) in enumerate(zip(given, optimizers, strict=True)):
        where, example = f"optimizer_states[{i}]", optimizer.param_groups
        require_like(state, {"state": {}}, where, path)
        groups: Any = state.get("param_groups")
        require_like(groups, ENTRIES, f"{where}.param_groups", path)
        for group in groups:
            count = len(group["params"]) if hasattr(group.get("params"), "__len__") else 1
            like = {"params": [0] * count, "lr": 0.0}
            require_like(group, like, f"{where}.param_groups", path)
            _require_settings(group, optimizer, f"{where}.param_groups", path)
        for accept in optimizer._optimizer_load_state_dict_pre_hooks.values():
            state = accept(optimizer, dict(state)) or state  # other groups of heads, or none
        groups = state["param_groups"]
        if len(groups) == len(example):  # else the optimizer itself says whether it takes them
            for j, (group, own) in enumerate(zip(groups, example, strict=True)):
                like = _shared(own, group) | {"params": [0] * len(own["params"])}
                require_like(group, like, f"{where}.param_groups[{j}]", path)
        parameters = [p for group in example for p in group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        shapes = {n: p.shape for n, p in zip(numbers, parameters, strict=False)}
        kept = {name for moments in state["state"].values() for name in moments}
        if kept and isinstance(optimizer, torch.optim.Adam):  # AdamW too
            kept |= {"step", *MOMENTS[:2]}
        for key, moments in state["state"].items():
            require_like(moments, dict.fromkeys(kept), f"{where}.state[{key}]", path)
            missing = sorted(kept - moments.keys())
            shape = shapes.get(key) if isinstance(key, int) else None
            is_whole, wrong = shape is not None and not missing, "does not fit the host's parameter"
            if not (is_whole and all(_is_moment(*m, shape=shape) for m in moments.items())):
                raise ConfigError(
                    f"checkpoint {path!r} cannot be resumed: {where}.state[{key}] "
                    f"{f'has no {missing[0]}' if missing else wrong}; resume from another"
                )
    for i, (state, scheduler) in enumerate(zip(saved, schedulers, strict=True)):
        like = _shared(scheduler.state_dict(), state)
        for key, value in like.items():  # lists by group: earlier versions had fewer groups
            if isinstance(value, list) and isinstance(state[key], list):
                like[key] = value[: max(1, len(state[key]))]
        require_like(state, like, f"lr_schedulers[{i}]", path)


def _require_settings(
    group: Mapping[str, Any], optimizer: Optimizer, where: str, path: str
) -> None:
    """Check that one of torch's own optimizers would take a saved group's rate, betas and so on."""
    own = type(optimizer)
    if not own.__module__.startswith("torch.optim"):
        return
    plain = (bool, int, float, tuple, list)
    usual = {k: v for k, v in optimizer.defaults.items() if k in group and type(v) in plain}
    settings = {k: group[k] for k in usual}
    try:
        own([nn.Parameter(torch.zeros(1))], **settings)
    except Exception as error:  # whatever the optimizer makes of them
        raise ConfigError(
            f"checkpoint {path!r} cannot be resumed: {where}: {type(error).__name__}: "
            f"{error}; the file was changed after it was written, resume from another"
        ) from error


def _is_moment(name: str, value: Any, *, shape: torch.Size | None) -> bool:
    """Whether an optimizer may keep `value` as `name` for a parameter of that shape."""
    if name in MOMENTS:
        is_plain_sgd = name == MOMENTS[-1] and value is None
        is_like = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        if not (is_like and _is_dense(value)):
            return is_plain_sgd
        return bool(all_finite([value]) and (not name.endswith("_sq") or value.ge(0).all()))
    if isinstance(value, Tensor):
        return bool(name != "step" or (value.numel() == 1 and value.ge(0).all()))
    return isinstance(value, int | float) and (name != "step" or value >= 0)


def _shared(example: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of `example` at keys of `given`: other versions have other keys."""
    plain = (bool, int, float, str, list, tuple)
    return {k: v for k, v in example.items() if k in given and isinstance(v, plain)}


def save(trainer: Any, folder: Path, step: int, keep: int | None) -> Path:
    """Save `step=....ckpt` and `last.ckpt`; all processes must call it.

    Args:
        trainer: Lightning's.
        folder: of the run's checkpoints.
        step: in the file's name.
        keep: how many `step=....ckpt` stay; None = all.

    Returns:
        The path of last.ckpt.

    Raises:
        ConfigError: if the disk is full; the checkpoints before stay as they were.
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
    """Return the checkpoints of a run folder, the newest first."""
    last = run / "checkpoints" / LAST
    steps = sorted((run / "checkpoints").glob("step=*.ckpt"), reverse=True)
    return ([last] if last.is_file() else []) + steps


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, or None."""
    return next(iter(candidates(run)), None)


def newest_whole(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a run folder that can be read, and what it holds.

    Raises:
        ConfigError: if there are checkpoints, and none of them can be read.
    """
    failed: list[ConfigError] = []
    for path in candidates(run):
        try:
            found = read(path)
        except ConfigError as error:
            failed.append(error)
            continue
        for earlier in failed:
            logger.warning("%s", earlier)
        if failed:
            logger.warning("resuming from the one before it: %s", path)
        return path, found
    if failed:
        raise ConfigError(f"{failed[0]}; no older checkpoint of {str(run)!r} is whole")
    return None


def check_config(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume another host's run.

    Raises:
        ConfigError: if the `model:` sections differ; it names the keys.
    """
    before = checkpoint[STATE]["config"]
    differ = differing({"model": before.get("model")}, {"model": config.get("model")})
    if differ:
        raise ConfigError(
            f"checkpoint {str(path)!r} is of another config: {', '.join(differ[:5])}; resume with "
            "the config in the run's folder, or start a new run under another --name"
        )
