"""Parts of a host that keep their weights: for good, or while the heads warm up.

A frozen part is in evaluation mode and its gradients are dropped before an update. It still
takes part in the backward pass, so that what the host computes from gradients (the adaptive
weight of its GAN) is as ever.
"""

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..finite import MAX_SKIPPED, all_finite, nonfinite_gradients
from ..host import require_quantizers, reconstruct
from ..sockets import ConfigError
from . import rng
from .data import Stream, train_loader
from .settings import TrainingConfig
from .state import STATE, require_fit, require_like, require_optimizers

PARTS = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
CODEBOOK = "codebook"
HEADS = "loss.lgvq."


class Freeze:
    """What of a host is frozen at a step.

    Args:
        host: with attributes `encoder`, `decoder` and a quantizer, where those are to be frozen.
        parts: some of encoder, decoder, codebook.
        heads_first: while the step is below it, everything but our heads is frozen.

    Attributes:
        heads: ids of the heads' parameters.

    Raises:
        ConfigError: if the host lacks a part, or has no heads to train first.
    """

    def __init__(self, host: nn.Module, parts: tuple[str, ...], heads_first: int):
        self.heads_first = heads_first
        heads = [p for name, p in host.named_parameters() if name.startswith(HEADS)]
        if heads_first and not heads:
            raise ConfigError(
                f"training.heads_first: {heads_first}, but {type(host).__name__} has no heads of "
                "LG-VQ; give it a loss of lgvq_plugin, or leave the key out"
            )
        self._for_good = [module for part in parts for module in _modules(host, part)]
        self._first = [module for name, module in host.named_children() if name != "loss"]
        discriminator = getattr(getattr(host, "loss", None), "discriminator", None)
        self._first += [discriminator] if isinstance(discriminator, nn.Module) else []
        self.heads = {id(p) for p in heads}
        self._others = [p for p in host.parameters() if id(p) not in self.heads]

    def trains_heads_only(self, step: int) -> bool:
        """Whether at `step` nothing but the heads learns."""
        return step < self.heads_first

    def quiet(self, step: int) -> None:
        """Put what is frozen at `step` into evaluation mode, the rest of the host's parts back."""
        if self.heads_first:
            for module in self._first:
                module.train(not self.trains_heads_only(step))
        for module in self._for_good:
            module.eval()

    def drop_gradients(self, step: int) -> None:
        """Forget the gradients of what is frozen at `step`."""
        for parameter in self._frozen(step):
            parameter.grad = None

    def _frozen(self, step: int) -> Iterator[nn.Parameter]:
        if self.trains_heads_only(step):
            yield from self._others
            return
        for module in self._for_good:
            yield from module.parameters()


def _modules(host: nn.Module, part: str) -> list[nn.Module]:
    children = dict(host.named_children())
    if part == CODEBOOK:
        known = getattr(getattr(host, "loss", None), "quantizer_path", None)
        return [*require_quantizers(host, known).values()]
    modules = [children[name] for name in PARTS[part] if name in children]
    if not modules:
        raise ConfigError(
            f"training.freeze: {type(host).__name__} has no {part!r}; it has {sorted(children)}"
        )
    return modules


# -- HostDriver: one training step of any taming-style host under Lightning 2 --------------------


logger = logging.getLogger(__name__)

PASSES = ("generator", "discriminator")


class HostDriver(pl.LightningModule):
    """Drives a host; its state dict is the host's, key for key.

    Args:
        host: follows taming's protocol (`get_input`, `loss`, `get_last_layer`,
            `configure_optimizers`, forward -> (xrec, qloss, ...)).
        settings: the `training:` section.
        dataset: the data set to train on; None if the driver only evaluates.
        batch_size: samples of one process in a batch.
        num_workers: processes that load samples.
        config: the plain config, kept in every checkpoint.

    Attributes:
        latest: what the host logged in the last step, by key; detached.
        samples: samples that all processes have taken so far.
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
    ):
        super().__init__()
        check_protocol(host)
        self.automatic_optimization = False
        self.host: Any = host
        self.settings, self.dataset = settings, dataset
        self.batch_size, self.num_workers = batch_size, num_workers
        self.config = dict(config or {})
        self.frozen = Freeze(host, tuple(settings.freeze), settings.heads_first)
        self.latest: dict[str, Tensor] = {}
        self.samples = 0
        self.has_stepped = False  # whether the batch before ended a step
        self._batches = 0  # of the step under way
        self._skipped: dict[int, int] = {}  # updates in a row that each optimizer left out
        self._has_fitted = False  # whether a batch has passed through the host
        self._generators: list[dict[str, Any]] | None = None
        self._resumed: Mapping[str, Any] | None = None
        # Buffers may hold -inf from the start (attention masks); nothing may come to hold it.
        self._infinite = {name for name, buffer in host.named_buffers() if not all_finite([buffer])}
        if hasattr(host.loss, "checks_gradients"):  # LGVQLoss: once is enough
            host.loss.checks_gradients = False

    # -- the step ----------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Pass `batch` through the host once (or twice) and update all its optimizers.

        Raises:
            ConfigError: if the first batch does not fit the host, or the host's own code fails.
        """
        if self._has_fitted:
            self._train_on(batch)
            return
        with explained(self.host, batch):
            self._train_on(batch)
        self._has_fitted = True

    def _train_on(self, batch: Any) -> None:
        step, self._batches = self.global_step, self._batches + 1
        self.has_stepped = self._batches == self.settings.accumulate_grad_batches
        self.frozen.quiet(step)
        require_captions = getattr(self.host.loss, "require_captions", None)
        if self.samples == 0 and callable(require_captions):  # LGVQLoss, with weights
            require_captions(batch)
        x = self.host.get_input(batch, self.host.image_key)
        output = self.host(x)
        if not self._has_fitted:
            _refuse_broadcast(self.host, batch, x, output[0])
        log: dict[str, Tensor] = {}
        for which, optimizer in enumerate(self._optimizers()):
            if which > 0 and self.frozen.trains_heads_only(step):
                break
            # What belongs to the other optimizer alone has requires_grad off in here.
            with optimizer.toggle_model(sync_grad=self.has_stepped):
                if which > 0 and self.settings.two_forward:
                    output = self.host(x)
                loss = self._loss(x, output, which, step, "train", log)
                self.manual_backward(loss / self.settings.accumulate_grad_batches)
                if self.has_stepped:
                    self.frozen.drop_gradients(step)
                self._require_finite(loss, log, optimizer, which, step)
                if self.has_stepped:
                    self._update(optimizer, step)
        self.latest = log
        self.samples += self.batch_size * self.trainer.world_size
        if self.has_stepped:
            self._batches = 0
            self._share_buffers()
            self._schedule()

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Return the host's validation log of `batch`, from both passes of its loss."""
        x = self.host.get_input(batch, self.host.image_key)
        output = self.host(x)
        log: dict[str, Tensor] = {}
        for which in range(len(self.trainer.optimizers)):
            self._loss(x, output, which, self.global_step, "val", log)
        return log

    def reconstruct(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and reconstructions, (B, 3, H, W) each, near [-1, 1]."""
        x = self.host.get_input(batch, self.host.image_key)
        return x, self.host(x)[0]

    def _loss(
        self, x: Tensor, output: Any, which: int, step: int, split: str, log: dict[str, Tensor]
    ) -> Tensor:
        reconstruction, codebook_loss = output[:2]
        result = self.host.loss(
            codebook_loss,
            x,
            reconstruction,
            which,
            step,
            last_layer=self.host.get_last_layer(),
            split=split,
        )
        loss, terms = result if isinstance(result, tuple) else (result, {})
        log.update({key: torch.as_tensor(value).detach() for key, value in terms.items()})
        log[f"{split}/{('aeloss', 'discloss')[which]}"] = loss.detach()  # taming's names
        return loss

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for extra in optimizers[1:]:
            # Lightning counts every optimizer's step: global_step would go up by 2 a batch, and
            # disc_start and max_steps would come at half the time (Lightning issue 17958).
            extra._on_before_step = extra._on_after_step = _nothing
        return optimizers

    def _require_finite(
        self, loss: Tensor, log: Mapping[str, Tensor], optimizer: Any, which: int, step: int
    ) -> None:
        """Check the loss and, before an update, all gradients; one read from the device for both.

        Raises:
            FloatingPointError: for a loss that is not finite, or for gradients, unless the next
                update is to be left out (`lgvq.on_nonfinite: skip`; fp16's own scaler); also
                after MAX_SKIPPED such updates in a row.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None] if self.has_stepped else []
        bad = torch.stack([~loss.detach().isfinite().all(), ~all_finite(gradients).to(loss.device)])
        if self.trainer.world_size > 1:  # all processes stop, or leave the update out, together
            bad = bad.float()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        loss_is_bad, gradient_is_bad = bad.tolist()
        if loss_is_bad:
            _raise_for_loss(log, which, step)
        if not gradient_is_bad:
            self._skipped[which] = 0 if self.has_stepped else self._skipped.get(which, 0)
            return
        where = nonfinite_gradients(self.host, held)
        found = f"step {step}: the {PASSES[which]}'s gradient is not finite in {where or '?'}"
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        skips = has_scaler or getattr(self.host.loss, "on_nonfinite", "raise") == "skip"
        self._skipped[which] = self._skipped.get(which, 0) + 1
        if not skips or self._skipped[which] >= MAX_SKIPPED:
            often = f", the {MAX_SKIPPED}th update in a row that is left out" if skips else ""
            raise FloatingPointError(
                f"{found}{often}; no weight was updated with it. Lower the learning rate or the "
                "weight of that term, or train in 32-true"
            )
        if not has_scaler:  # GradScaler leaves the update out by itself, and lowers its scale
            logger.warning("%s; this update is left out", found)
            optimizer.zero_grad(set_to_none=True)

    def _update(self, optimizer: Any, step: int) -> None:
        clip = self.settings.gradient_clip_val
        if clip is not None:
            # fp16 gradients still carry the scaler's factor here: the limit carries it too.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            limit = clip * (scaler.get_scale() if scaler is not None else 1.0)
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            factor = self.warmup(group, step)
            group["lr"] = rate if factor == 1.0 else rate * factor
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the host's schedules go on from their own
        optimizer.zero_grad(set_to_none=True)

    def warmup(self, group: Mapping[str, Any], step: int) -> float:
        """Return the share of its learning rate that a parameter group has at `step`, in (0, 1].

        The heads warm up from step 0; everything else from the step at which it begins to learn.
        """
        if not self.settings.warmup_steps:
            return 1.0
        is_heads = any(id(p) in self.frozen.heads for p in group["params"])
        done = step - (0 if is_heads else self.settings.heads_first)
        return min(1.0, max(1, done + 1) / (self.settings.warmup_steps + 1))

    def nonfinite(self) -> list[str]:
        """Return the names of the host's weights, buffers and moments that are not finite."""
        found = [name for name, p in self.host.named_parameters() if not all_finite([p])]
        found += [
            name
            for name, buffer in self.host.named_buffers()
            if name not in self._infinite and not all_finite([buffer])
        ]
        names = {p: name for name, p in self.host.named_parameters()}
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                if not all_finite([value for value in state.values() if isinstance(value, Tensor)]):
                    found.append(f"{names.get(parameter, '?')}, in the optimizer's state")
        return found

    def _share_buffers(self) -> None:
        """Give all processes the first one's buffers (BatchNorm's, an EMA codebook's).

        DDP does so before a forward pass, but not under manual optimization: it takes Lightning's
        switch for gradients, thrown then, for its own; the processes would drift apart.
        """
        if self.trainer.world_size > 1:
            for buffer in self.host.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _schedule(self) -> None:
        """Step the host's learning rate schedules: by step, or where an epoch of data ends."""
        taken = self.samples // (self.batch_size * self.trainer.world_size)
        per_epoch = max(1, self._stream().per_epoch // (self.batch_size * self.trainer.world_size))
        ends_epoch = taken % per_epoch < self.settings.accumulate_grad_batches
        for config in self.trainer.lr_scheduler_configs:
            is_due = self.global_step % config.frequency == 0
            if is_due if config.interval == "step" else ends_epoch:
                scheduler: Any = config.scheduler
                scheduler.step()

    # -- what Lightning asks for -------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return what the host returns; its `learning_rate` is set before."""
        return self.host.configure_optimizers()

    def train_dataloader(self) -> DataLoader:
        """Return the endless loader, from the sample on where a resumed run stopped."""
        return train_loader(
            self.dataset,
            self._stream(),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _stream(self) -> Stream:
        return Stream(
            length=len(self.dataset),
            batch_size=self.batch_size,
            seed=self.settings.seed,
            start=self.samples,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def on_fit_start(self) -> None:
        """Tell modules of the other Lightning package where they are; ours moves only tensors.

        Raises:
            ConfigError: if the optimizers' states to be resumed do not fit.
        """
        if self._resumed is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            states, saved = self._resumed["optimizer_states"], self._resumed["lr_schedulers"]
            require_optimizers(states, self.trainer.optimizers, schedulers, saved, self._path)
        part: Any
        for part in self.host.modules():
            if "_device" in vars(part):
                part._device = self.device

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first batch, set the generators: afresh, or as they were when saved."""
        if self._generators is None:
            return
        rank = self.trainer.global_rank
        if rank < len(self._generators):
            rng.restore(self._generators[rank])
        else:  # resumed on more processes than before
            rng.seed_all(self.settings.seed + rank + self.global_step)
        self._generators = None

    def on_train_start(self) -> None:
        """Give each process a stream of its own, which no construction before has moved.

        Raises:
            ConfigError: if a checkpoint contradicts itself about its step.
        """
        saved, self._resumed = self._resumed, None
        if saved is not None and saved["global_step"] != self.global_step:
            raise ConfigError(
                f"checkpoint {self._path!r} cannot be resumed: global_step is "
                f"{saved['global_step']}, its loops are at {self.global_step}; the file was "
                "changed, resume from another"
            )
        if self._generators is None:
            rng.seed_all(self.settings.seed + self.trainer.global_rank)

    @property
    def _path(self) -> str:
        """Of the checkpoint that is resumed."""
        return str(self.trainer.ckpt_path)

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
        checkpoint[STATE] = {
            "samples": self.samples,
            "generators": generators,
            "config": self.config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ConfigError: if something in it does not fit the host.
        """
        require_fit(checkpoint["state_dict"], self.host, "state_dict", self._path)
        loops = self.trainer.fit_loop.state_dict()
        require_like(checkpoint["loops"]["fit_loop"], loops, "loops.fit_loop", self._path)
        kept = checkpoint[STATE]
        for generators in kept["generators"]:
            try:
                with rng.preserved():
                    rng.restore(generators)
            except Exception as error:  # whatever the generators make of it
                raise ConfigError(
                    f"checkpoint {self._path!r} cannot be resumed: {STATE}.generators holds no "
                    f"states of generators ({type(error).__name__}: {error}); resume from another"
                ) from error
        self._resumed = checkpoint
        self.samples = kept["samples"]
        self._generators = kept["generators"]


def check_protocol(host: nn.Module) -> None:
    """Refuse a host that this driver cannot drive.

    Raises:
        ConfigError: if the host optimizes by hand itself, or lacks a part of the protocol.
    """
    # The seam for hosts with a manual training_step of their own (SEED-Voken): a driver that
    # only forwards to it, chosen where run.py builds this one.
    if getattr(host, "automatic_optimization", True) is False:
        raise ConfigError(
            f"{type(host).__name__} optimizes by hand itself; give it to a lightning Trainer "
            "directly: LGVQLoss needs no more than its line in the config there"
        )
    needed = ("get_input", "image_key", "loss", "get_last_layer", "configure_optimizers")
    missing = [name for name in needed if not hasattr(host, name)]
    if missing:
        raise ConfigError(
            f"{type(host).__name__} has no {', '.join(missing)}: `lgvq train` drives hosts with "
            "taming's protocol; for others use lgvq_plugin.attach in a loop of your own"
        )


def _raise_for_loss(log: Mapping[str, Tensor], which: int, step: int) -> None:
    bad = [f"{key} = {value.item()}" for key, value in log.items() if not value.isfinite().all()]
    raise FloatingPointError(
        f"step {step}: the {PASSES[which]}'s loss is not finite: {', '.join(bad)}; "
        "lower the learning rate, clip (training.gradient_clip_val), or train in 32-true"
    )


@contextmanager
def explained(host: Any, batch: Any) -> Iterator[None]:
    """Turn what a host raises at its first batch into a ConfigError that says why.

    Raises:
        ConfigError: what of the batch does not fit the host, or where in its code it failed.
    """
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a batch does not fit in the device's memory; lower data.batch_size: {error}"
        ) from error
    except Exception as error:
        said = misfit(host, batch)
        place = _place_in_host(error)
        if place is None and said is None:
            raise
        at = f"; {type(error).__name__}: {error}" + (f" ({place})" if place else "")
        said = said or f"{type(host).__name__}'s own code failed at its first batch"
        raise ConfigError(said + at) from error


def misfit(host: Any, batch: Any) -> str | None:
    """Return why `batch` does not fit `host`, in words; None if it seems to.

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
        return f"the first batch does not fit the host: images of shape {tuple(x.shape[1:])}"
    given = f"data gives {channels} × {sides[0]} × {sides[1]}"
    takes = _channels_in(getattr(host, "encoder", host)) or channels
    gives, multiple = _tried(host, takes, sides)
    loss = getattr(host, "loss", None)
    seen = _channels_in(getattr(loss, "discriminator", None))
    said = [f"this host takes {_count(takes)}"] if takes != channels else []
    if multiple > 1:
        said.append(("" if said else "this host takes ") + f"multiples of {multiple}")
    hints = []
    if takes != channels:
        hints.append("in_channels of the model, or `channels` of the data set")
    if multiple > 1:
        hints.append("`size` of the data set")
    if gives not in (None, channels):
        said.append(f"its decoder gives {_count(gives)}")
        hints.append(f"out_ch: {channels}")
    if getattr(loss, "disc_conditional", False):
        said.append("its discriminator wants a condition, which is not given")
        hints.append("disc_conditional: false")
    elif seen not in (None, gives or channels):
        said.append(f"its discriminator takes {_count(seen)}")
        hints.append(f"disc_in_channels: {gives or channels}")
    if not said:
        return None
    return (
        f"the first batch does not fit the host: {given}; {' and '.join(said)}. "
        f"Change {'; '.join(hints)}"
    )


def _count(channels: int | None) -> str:
    return f"{channels} channel" + "s" * (channels != 1)


def _channels_in(module: nn.Module | None) -> int | None:
    """Return the channels that the first convolution takes, the loss's left out."""
    if module is None:
        return None
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return None if first is None else first.in_channels


def _tried(host: Any, channels: int, sides: list[int]) -> tuple[int | None, int]:
    """Return the channels that the host gives, and of what the sides must be multiples."""
    like = next(host.parameters())
    host.eval()

    def gives(height: int, width: int) -> int | None:
        blank = torch.zeros(1, channels, height, width, dtype=like.dtype, device=like.device)
        try:
            with torch.no_grad():
                made = reconstruct(host, blank)
        except Exception:  # sizes that it was not made for
            return None
        return int(made.shape[1]) if made.shape[2:] == blank.shape[2:] else None

    found = gives(*sides)
    multiple = 1
    while found is None and multiple < 64:
        multiple *= 2
        up = [-(-side // multiple) * multiple for side in sides]
        # The next multiple, too: a smaller step may meet a good size by chance.
        found = gives(*up) if gives(up[0] + multiple, up[1] + multiple) is not None else None
    return found, multiple if found is not None else 1


def _refuse_broadcast(host: Any, batch: Any, x: Tensor, reconstruction: Any) -> None:
    """Refuse reconstructions that torch would stretch to the images' shape without a word."""
    if not isinstance(reconstruction, Tensor) or reconstruction.ndim != x.ndim:
        return
    pairs = [(a, b) for a, b in zip(x.shape, reconstruction.shape, strict=True) if a != b]
    if pairs and all(1 in pair for pair in pairs):
        shapes = f"images {tuple(x.shape)}, reconstructions {tuple(reconstruction.shape)}"
        raise ConfigError(misfit(host, batch) or f"the first batch does not fit the host: {shapes}")


def _place_in_host(error: BaseException) -> str | None:
    """Return file, line and text where foreign code failed; None if it was torch's or ours."""
    libraries = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pl))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not own or own[-1].filename.startswith((str(Path(__file__).parents[1]), "<")):
        return None
    last = own[-1]
    return f"{last.filename}:{last.lineno} in {last.name}: {last.line}"


def _nothing() -> None:
    return
