"""HostDriver: one training step of any taming-style host under Lightning 2."""

import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..alignment import Schedule
from ..config import DEFAULTS
from ..functional import (
    LARGEST_GRADIENT,
    MAX_SKIPPED,
    all_finite,
    drop_gradients,
    nonfinite_gradients,
)
from ..host import reconstruct
from ..quantizer_hook import require_quantizers
from ..sockets import ConfigError
from . import rng, state
from .data import Stream, train_loader
from .settings import TrainingConfig

logger = logging.getLogger(__name__)

PASSES = ("generator", "discriminator")
PARTS = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
PROTOCOL = ("get_input", "image_key", "loss", "get_last_layer", "configure_optimizers")
HEADS = "loss.lgvq."
MISFIT = "the first batch does not fit the host"


class HostDriver(pl.LightningModule):
    """Drives a host; its state dict is the host's, key for key.

    Args:
        host: follows taming's protocol (`PROTOCOL`, forward -> (xrec, qloss, ...)); otherwise a
            ConfigError is raised.
        settings: the `training:` section.
        dataset: the data set to train on; None if the driver only evaluates.
        batch_size: samples of one process in a batch, which `num_workers` processes load.
        config: the plain config, kept in every checkpoint.
        adapters: parameters in frozen parts that learn nevertheless.
    """

    def __init__(
        self,
        host: nn.Module,
        settings: TrainingConfig,
        *,
        dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        config: Mapping[str, Any] | None = None,
        adapters: Sequence[nn.Parameter] = (),
    ):
        super().__init__()
        _check_protocol(host)
        self.automatic_optimization = False
        self.host: Any = host
        self.settings, self.dataset = settings, dataset
        self.batch_size, self.num_workers = batch_size, num_workers
        self.config = dict(config or {})
        self.frozen = Freeze(host, settings.frozen, settings.heads_first, spared=adapters)
        self.latest: dict[str, Tensor] = {}  # what the host logged in the last step
        self.samples = 0  # that all processes together have taken so far
        self.has_stepped = False  # whether the last batch ended a step
        self._batches = 0  # of the step under way
        self._heads: Any = None  # from `on_train_start` on
        self._skipped = [0, 0]  # consecutive updates that each optimizer skipped
        self._has_fitted = False  # whether a batch has passed through the host
        self._resumed: dict[str, Any] | None = None  # the checkpoint, until training starts
        # Buffers may hold -inf from the start (attention masks), but must not become infinite.
        self._infinite = {name for name, buffer in host.named_buffers() if not all_finite([buffer])}
        loss: Any = host.loss
        if hasattr(loss, "checks_gradients"):  # LGVQLoss: the driver checks them
            loss.checks_gradients, loss.total_steps = False, settings.max_steps
            heads = loss.alignment
            if heads is not None and "host" in settings.freeze and heads.schedule.is_auto:
                heads.schedule = Schedule(replace(heads.config, stop=None))  # nothing else trains

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Pass `batch` through the host once (or twice) and update all its optimizers.

        Raises ConfigError if the first batch does not fit the host, or the host's own code fails.
        """
        if self._has_fitted:
            self._train_on(batch)
            return
        require_captions = getattr(self.host.loss, "require_captions", None)
        with explained(self.host, batch):
            if self.samples == 0 and callable(require_captions):  # LGVQLoss, with weights
                require_captions(batch)
            self._train_on(batch)
        self._has_fitted = True

    def _train_on(self, batch: Any) -> None:
        step, self._batches = self.global_step, self._batches + 1
        self.has_stepped = self._batches == self.settings.accumulate_grad_batches
        self.frozen.set_modes(step)
        heads = self._heads
        if heads is not None:
            heads.alone = self.frozen.leaves_heads_alone(step)
        x, output = self._forward(batch)
        if not self._has_fitted:
            require_same_shape(self.host, batch, x, output[0])
        log: dict[str, Tensor] = {}
        for which, optimizer in enumerate(self._optimizers()):
            if which > 0 and step < self.frozen.heads_first:
                break
            # What belongs to the other optimizer alone has requires_grad off in here.
            with optimizer.toggle_model(sync_grad=self.has_stepped):
                if which > 0 and self.settings.two_forward:
                    output = self.host(x)
                loss = self._loss(x, output, which, step, "train", log)
                self.manual_backward(loss / self.settings.accumulate_grad_batches)
                is_idle = heads is not None and which == 0 and not heads.acted
                if self.has_stepped:
                    self.frozen.drop_gradients(step)
                    if is_idle:  # of DDP, as without it there are none
                        drop_gradients(heads)
                self._require_finite(loss, log, optimizer, which, step, is_idle=is_idle)
                if self.has_stepped:
                    self._update(optimizer, step)
                    if heads is not None and which == 0:
                        heads.acted = False
        self.latest = log
        self.samples += self.batch_size * self.trainer.world_size
        if self.has_stepped:
            self._batches = 0
            self._share_buffers()
            self._schedule()

    def _forward(self, batch: Any) -> tuple[Tensor, Any]:
        x = self.host.get_input(batch, self.host.image_key)
        return x, self.host(x)

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Return the host's validation log of `batch`, from both passes of its loss."""
        log: dict[str, Tensor] = {}
        x, output = self._forward(batch)
        for which in range(len(self.trainer.optimizers)):
            self._loss(x, output, which, self.global_step, "val", log)
        return log

    def reconstruct(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and reconstructions, (B, 3, H, W) each, near [-1, 1]."""
        x, output = self._forward(batch)
        return x, output[0]

    def _loss(
        self, x: Tensor, output: Any, which: int, step: int, split: str, log: dict[str, Tensor]
    ) -> Tensor:
        options: Any = {"last_layer": self.host.get_last_layer(), "split": split}
        result = self.host.loss(output[1], x, output[0], which, step, **options)
        loss, terms = result if isinstance(result, tuple) else (result, {})
        log.update({key: torch.as_tensor(value).detach() for key, value in terms.items()})
        log[f"{split}/{('aeloss', 'discloss')[which]}"] = loss.detach()  # taming's names
        return loss

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for extra in optimizers[1:]:
            # Lightning counts every optimizer's step: global_step would go up by 2 per batch, and
            # disc_start and max_steps would come at half the time (Lightning issue 17958).
            extra._on_before_step = extra._on_after_step = lambda: None
        return optimizers

    @property
    def _scaler(self) -> Any:
        """Of fp16; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _require_finite(
        self,
        loss: Tensor,
        log: Mapping[str, Tensor],
        optimizer: Any,
        which: int,
        step: int,
        *,
        is_idle: bool,
    ) -> None:
        """Check the loss and, before an update, all gradients, with one read from the device.

        Raises FloatingPointError for a loss that is not finite, or for gradients, unless the next
        update is to be skipped (`lgvq.on_nonfinite: skip`; fp16's own scaler); also after
        MAX_SKIPPED such updates in a row, between which updates without our terms (`is_idle`)
        do not count.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None] if self.has_stepped else []
        is_finite = all_finite(gradients, limit=LARGEST_GRADIENT).to(loss.device)
        bad = torch.stack([~loss.detach().isfinite().all(), ~is_finite])
        if self.trainer.world_size > 1:  # all processes stop, or skip the update, together
            bad = bad.float()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        loss_is_bad, gradient_is_bad = bad.tolist()
        if loss_is_bad:
            terms = (f"{k} = {v.item()}" for k, v in log.items() if not v.isfinite().all())
            raise FloatingPointError(
                f"step {step}: the {PASSES[which]}'s loss is not finite: {', '.join(terms)}; lower "
                "the learning rate, clip (training.gradient_clip_val), or train in 32-true"
            )
        if not gradient_is_bad:
            if self.has_stepped and not is_idle:
                self._skipped[which] = 0
            return
        problem = nonfinite_gradients(self.host, held)
        found = f"step {step}: the {PASSES[which]}'s gradient is {problem}"
        skips = self._scaler or getattr(self.host.loss, "on_nonfinite", "raise") == "skip"
        self._skipped[which] += 1
        if not skips or self._skipped[which] >= MAX_SKIPPED:
            count = f", the {MAX_SKIPPED}th skipped update in a row" if skips else ""
            raise FloatingPointError(
                f"{found}{count}; no weight was updated with it. Lower the learning rate or the "
                "weight of that term, or train in 32-true"
            )
        if self._scaler is None:  # GradScaler skips the update by itself, and lowers its scale
            logger.warning("%s; this update is skipped", found)
            optimizer.zero_grad(set_to_none=True)

    def _update(self, optimizer: Any, step: int) -> None:
        limit = self.settings.gradient_clip_val
        if limit is not None:
            # fp16 gradients still carry the scaler's factor here: the limit carries it too.
            limit *= self._scaler.get_scale() if self._scaler is not None else 1.0
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if (factor := self.warmup(group, step)) != 1.0:
                group["lr"] = group["lr"] * factor
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the host's schedules continue from their own
        optimizer.zero_grad(set_to_none=True)

    def warmup(self, group: Mapping[str, Any], step: int) -> float:
        """Return the share of its learning rate that a parameter group has at `step`, in (0, 1].

        The heads warm up from step 0; everything else from the step at which it starts to learn.
        """
        if not self.settings.warmup_steps:
            return 1.0
        is_heads = any(id(p) in self.frozen.heads for p in group["params"])
        done = step - (0 if is_heads else self.settings.heads_first)
        return min(1.0, max(1, done + 1) / (self.settings.warmup_steps + 1))

    def nonfinite(self) -> list[str]:
        """Return the names of weights, buffers and optimizer states that are not finite."""
        names = {p: name for name, p in self.host.named_parameters()}
        tensors = [(name, [p]) for p, name in names.items()]
        tensors += [(n, [b]) for n, b in self.host.named_buffers() if n not in self._infinite]
        for optimizer in self.trainer.optimizers:
            for parameter, moments in optimizer.state.items():
                values = [value for value in moments.values() if isinstance(value, Tensor)]
                tensors.append((f"{names.get(parameter, '?')}, in the optimizer's state", values))
        return [name for name, values in tensors if not all_finite(values)]

    def _share_buffers(self) -> None:
        """Give all processes the first one's buffers (BatchNorm's, an EMA codebook's).

        DDP does so before a forward pass, but not under manual optimization: it takes Lightning's
        switch for gradients for its own, and the processes would drift apart.
        """
        if self.trainer.world_size > 1:
            for buffer in self.host.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _schedule(self) -> None:
        """Step the host's learning rate schedules: by step, or where an epoch of data ends."""
        batch = self.batch_size * self.trainer.world_size
        for config in self.trainer.lr_scheduler_configs:
            per_epoch = max(1, self._stream().per_epoch // batch)
            ends_epoch = self.samples // batch % per_epoch < self.settings.accumulate_grad_batches
            is_due = self.global_step % config.frequency == 0
            if is_due if config.interval == "step" else ends_epoch:
                scheduler: Any = config.scheduler
                scheduler.step()

    # Lightning's hooks, in the order of a run.

    def configure_optimizers(self) -> Any:
        """Return what the host returns; its `learning_rate` is set before."""
        return self.host.configure_optimizers()

    def train_dataloader(self) -> DataLoader:
        """Return the endless loader, from the sample on at which a resumed run stopped."""
        pin = self.device.type == "cuda"
        options: Any = {"num_workers": self.num_workers, "pin_memory": pin}
        return train_loader(self.dataset, self._stream(), **options)

    def _stream(self) -> Stream:
        return Stream(
            length=len(self.dataset),
            batch_size=self.batch_size,
            seed=self.settings.seed,
            start=self.samples,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def checking(self) -> Any:
        """Return a context whose Unfit become a CheckpointError about the resumed checkpoint."""
        return state.checking(str(self.trainer.ckpt_path))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the place in the data; generators follow when training starts.

        Raises CheckpointError if something in it does not fit the host.
        """
        kept = checkpoint[state.STATE]
        with self.checking():
            state.require_fit(checkpoint["state_dict"], self.host, "state_dict")
            loops = self.trainer.fit_loop.state_dict()
            state.require_like(checkpoint["loops"]["fit_loop"], loops, "loops.fit_loop")
            for generators in kept["generators"]:
                try:
                    with rng.preserved():
                        rng.restore(generators)
                except Exception as error:  # whatever the generators make of it
                    problem = f"{state.STATE}.generators: {type(error).__name__}: {error}"
                    raise state.Unfit(problem) from error
        self._resumed, self.samples = checkpoint, kept["samples"]

    def on_fit_start(self) -> None:
        """Tell modules of the other Lightning package their device; ours moves only tensors.

        Raises CheckpointError if the optimizers' states to be resumed do not fit.
        """
        if self._resumed is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            with self.checking():
                state.require_optimizers(self._resumed, self.trainer.optimizers, schedulers)
        part: Any
        for part in self.host.modules():
            if "_device" in vars(part):
                part._device = self.device

    def on_train_start(self) -> None:
        """Raise CheckpointError if a checkpoint does not agree with itself about its step."""
        self._heads = getattr(self.host.loss, "alignment", None)
        saved = self._resumed and self._resumed["global_step"]
        with self.checking():
            if saved not in (None, self.global_step):
                raise state.Unfit(f"global_step is {saved}, its loops are at {self.global_step}")
        # Give each process a stream of its own, independent of how the host was built.
        rng.seed_all(self.settings.seed + self.trainer.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first batch of a resumed run, restore the generators."""
        if self._resumed is None:
            return
        rank, generators = self.trainer.global_rank, self._resumed[state.STATE]["generators"]
        if rank < len(generators):
            rng.restore(generators[rank])
        else:  # resumed on more processes than before
            rng.seed_all(self.settings.seed + rank + self.global_step)
        ratio = self._resumed[state.STATE].get(state.RATIO)
        if isinstance(ratio, Tensor) and hasattr(self.host.loss, "measured_ratio"):
            self.host.loss.measured_ratio = ratio.to(self.device)
        if self._heads is not None:
            known = self.global_step * self.settings.accumulate_grad_batches
            self._heads.batches = int(self._resumed[state.STATE].get(state.BATCHES, known))
        self._resumed = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the host's state dict."""
        return self.host.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the host's state dict."""
        return self.host.load_state_dict(state_dict, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a bit-exact resume needs: generators of all processes, place in the data."""
        generators = [rng.state()]
        if self.trainer.world_size > 1:
            generators = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(generators, rng.state())
        ratio = getattr(self.host.loss, "measured_ratio", None)
        checkpoint[state.STATE] = {
            "samples": self.samples,
            "generators": generators,
            "config": self.config,
            state.VERSION_OF_DEFAULTS: DEFAULTS,
            state.RATIO: ratio.detach().cpu() if ratio is not None and ratio.isfinite() else None,
            state.BATCHES: getattr(self._heads, "batches", 0),
            "moments": [len(each["state"]) for each in checkpoint.get("optimizer_states", [])],
        }


class Freeze:
    """Which parts of a host keep their weights: for good, or while the heads train first.

    A frozen part is in evaluation mode and its gradients are dropped before an update. It still
    takes part in the backward pass, so that what the host computes from gradients (the adaptive
    weight of its GAN) is unchanged. Raises ConfigError if the host lacks a part, or has no heads.

    `parts` are some of encoder, decoder, codebook, host; while the step is below `heads_first`,
    or always with `host`, everything but the parameters with ids in `heads` is frozen. `spared` are
    parameters in frozen parts that learn.
    """

    def __init__(
        self,
        host: nn.Module,
        parts: tuple[str, ...],
        heads_first: int,
        spared: Sequence[nn.Parameter] = (),
    ):
        self.heads_first = math.inf if "host" in parts else heads_first
        self.heads = {id(p) for name, p in host.named_parameters() if name.startswith(HEADS)}
        if self.heads_first and not self.heads:
            key = "freeze: [host]" if "host" in parts else f"heads_first: {heads_first}"
            raise ConfigError(
                f"training.{key}, but {type(host).__name__} has no heads of LG-VQ; give it a loss "
                "of lgvq_plugin, or leave the key out"
            )
        self._frozen = [m for part in parts if part != "host" for m in _modules(host, part)]
        self._first = [module for name, module in host.named_children() if name != "loss"]
        discriminator = getattr(getattr(host, "loss", None), "discriminator", None)
        self._first += [discriminator] if isinstance(discriminator, nn.Module) else []
        self._spared = {id(p) for p in spared}
        self._makes_no_codes = {"encoder", "codebook"} <= {*parts} and not spared
        self._others = [p for p in host.parameters() if id(p) not in self.heads]

    def set_modes(self, step: int) -> None:
        """Put what is frozen at `step` into evaluation mode, and back into training mode after."""
        if self.heads_first:
            for module in self._first:
                module.train(step >= self.heads_first)
        for module in self._frozen:
            module.eval()

    def leaves_heads_alone(self, step: int) -> bool:
        """Return whether nothing that makes the codes learns at `step`."""
        return step < self.heads_first or self._makes_no_codes

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients of what is frozen at `step`."""
        inside = (p for module in self._frozen for p in module.parameters())
        frozen = (p for p in inside if id(p) not in self._spared)
        for parameter in self._others if step < self.heads_first else frozen:
            parameter.grad = None


def _modules(host: nn.Module, part: str) -> list[nn.Module]:
    if part == "codebook":
        known = getattr(getattr(host, "loss", None), "quantizer_path", None)
        return [*require_quantizers(host, known).values()]
    children = dict(host.named_children())
    modules = [children[name] for name in PARTS[part] if name in children]
    if not modules:
        raise ConfigError(
            f"training.freeze: {type(host).__name__} has no {part!r}; it has {sorted(children)}"
        )
    return modules


def _check_protocol(host: nn.Module) -> None:
    # Hosts with a manual training_step of their own (SEED-Voken) need a driver that only forwards
    # to it; it would be chosen where run.py builds this one.
    if getattr(host, "automatic_optimization", True) is False:
        raise ConfigError(
            f"{type(host).__name__} optimizes by hand itself; give it to a lightning Trainer "
            "directly: LGVQLoss needs no more than its line in the config there"
        )
    missing = [name for name in PROTOCOL if not hasattr(host, name)]
    if missing:
        raise ConfigError(
            f"{type(host).__name__} has no {', '.join(missing)}: `lgvq train` drives hosts with "
            "taming's protocol; for others use lgvq_plugin.attach in a loop of your own"
        )


# Why the first batch does not fit the host, in the words of the config.


@contextmanager
def explained(host: Any, batch: Any) -> Iterator[None]:
    """Turn what a host raises at its first batch into a ConfigError that says why and where."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a batch does not fit in the device's memory; lower data.batch_size: {error}"
        ) from error
    except Exception as error:
        reason, place = misfit(host, batch), _place_in_host(error)
        if place is None and reason is None:
            raise
        at = f"; {type(error).__name__}: {error}" + (f" ({place})" if place else "")
        reason = reason or f"{type(host).__name__}'s own code failed at its first batch"
        raise ConfigError(reason + at) from error


def require_same_shape(host: Any, batch: Any, x: Tensor, reconstruction: Any) -> None:
    """Raise ConfigError if torch would silently broadcast the reconstructions to the images."""
    if not isinstance(reconstruction, Tensor) or reconstruction.ndim != x.ndim:
        return
    pairs = [(a, b) for a, b in zip(x.shape, reconstruction.shape, strict=True) if a != b]
    if pairs and all(1 in pair for pair in pairs):
        shapes = f"images {tuple(x.shape)}, reconstructions {tuple(reconstruction.shape)}"
        raise ConfigError(misfit(host, batch) or f"{MISFIT}: {shapes}")


def misfit(host: Any, batch: Any) -> str | None:
    """Return why `batch` does not fit `host`; None if no reason is found.

    It tries the host on blank images of other channels and sizes, in eval mode.
    """
    key = host.image_key
    if isinstance(batch, Mapping) and key not in batch:
        return (
            f"model.params.image_key: {key!r}: a batch has no such key, only "
            f"{', '.join(map(str, batch))}; the data sets of this package give `image`"
        )
    try:
        x = host.get_input(batch, key)
        channels, *sides = (int(n) for n in x.shape[1:])
    except Exception:  # the host's own code on data that it was not made for
        return None
    if len(sides) != 2:
        return f"{MISFIT}: images of shape {tuple(x.shape[1:])}"
    takes = _channels_in(getattr(host, "encoder", host)) or channels
    gives, multiple = _try_sizes(host, takes, sides)
    loss = getattr(host, "loss", None)
    seen = _channels_in(getattr(loss, "discriminator", None))
    found = {}  # the reason: what to change
    if takes != channels:
        hint = "in_channels of the model, or `channels` of the data set"
        found[f"this host takes {_count(takes)}"] = hint
    if multiple > 1:
        verb = "" if found else "this host takes "
        found[f"{verb}multiples of {multiple}"] = "`size` of the data set"
    if gives not in (None, channels):
        found[f"its decoder gives {_count(gives)}"] = f"out_ch: {channels}"
    if getattr(loss, "disc_conditional", False):
        reason = "its discriminator expects a condition, which is not given"
        found[reason] = "disc_conditional: false"
    elif seen not in (None, gives or channels):
        found[f"its discriminator takes {_count(seen)}"] = f"disc_in_channels: {gives or channels}"
    if not found:
        return None
    given = f"data gives {channels} × {sides[0]} × {sides[1]}"
    return f"{MISFIT}: {given}; {' and '.join(found)}. Change {'; '.join(found.values())}"


def _count(channels: int | None) -> str:
    return f"{channels} channel" + "s" * (channels != 1)


def _channels_in(module: nn.Module | None) -> int | None:
    """Return the channels that the first convolution takes."""
    modules = module.modules() if module is not None else ()
    return next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), None)


def _try_sizes(host: Any, channels: int, sides: list[int]) -> tuple[int | None, int]:
    """Return the channels that the host gives, and of what the sides must be multiples."""
    like = next(host.parameters())
    host.eval()

    def gives(*shape: int) -> int | None:
        try:
            with torch.no_grad():
                made = reconstruct(host, like.new_zeros(1, channels, *shape))
        except Exception:  # sizes that it was not made for
            return None
        return int(made.shape[1]) if made.shape[2:] == shape else None

    found, multiple = gives(*sides), 1
    while found is None and multiple < 64:
        multiple *= 2
        up = [-(-side // multiple) * multiple for side in sides]
        # The next multiple, too: a smaller step may meet a good size by chance.
        found = gives(*up) if gives(up[0] + multiple, up[1] + multiple) is not None else None
    return found, multiple if found is not None else 1


def _place_in_host(error: BaseException) -> str | None:
    """Return file, line and text where foreign code failed; None if it was torch's or ours."""
    libraries = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pl))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not own or own[-1].filename.startswith((str(Path(__file__).parents[1]), "<")):
        return None
    return "{0.filename}:{0.lineno} in {0.name}: {0.line}".format(own[-1])
