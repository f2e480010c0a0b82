"""Time a training step with and without LG-VQ, in turns in one process."""

import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import InitVar, asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..config import laid_over, parse
from ..datasets.scenes import Scenes
from ..guides.base import AbstractGuide, build_guide
from ..guides.cached import CachedGuide
from ..shipped import shipped
from ..training.build import build_host
from ..training.config import read_config, to_plain
from ..types import Codes, TextFeatures, TextTokens
from .speed import Case

CLIP = {"use": "open_clip", "model": "ViT-B-32", "pretrained": None}  # speed needs no weights
BATCHES = 16  # different batches, so that captions vary as in training
Timer = Callable[[str], AbstractContextManager[Any]]
LATE = 10**7  # a step at which the discriminator takes part


@dataclass(frozen=True)
class Result:
    """Seconds per step of a case, with and without LG-VQ.

    Args:
        case: what was timed.
        batch_size: images per step.
        ratios: LG-VQ step / bare step of each round.
        bare, lgvq: seconds per step of each round.
        parts: seconds per aligned LG-VQ step by part, the median over rounds.
        memory: peak MiB of a step with its weights and optimizer, "bare" and "lgvq"; CUDA only.
        every: `lgvq.every`; one of so many steps was aligned.
    """

    case: Case
    batch_size: int
    ratios: list[float]
    bare: list[float]
    lgvq: list[float]
    parts: dict[str, float]
    memory: dict[str, float]
    every: int = 1

    @property
    def ratio(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        shown = {**asdict(self), "case": self.case.name, "title": self.case.title}
        bare, lgvq = statistics.median(self.bare), statistics.median(self.lgvq)
        return {
            **shown,
            "ratio": self.ratio,
            "range": [min(self.ratios), max(self.ratios)],
            "target": self.case.target,
            "milliseconds": {"bare": 1000 * bare, "lgvq": 1000 * lgvq},
            "images_per_second": {"bare": self.batch_size / bare, "lgvq": self.batch_size / lgvq},
        }


@dataclass
class Step:
    """One training step of a taming-style host: both optimizers, one forward pass or two.

    The arithmetic is that of `lgvq train`, without Lightning, data loading and checks.

    Args:
        host: the host, moved to `device`.
        device: where it trains.
        two_forward: a second forward pass for the discriminator, as in taming.
        new_captions: forget the captions of earlier steps.
    """

    host: Any
    device: InitVar[torch.device]
    two_forward: bool = False
    new_captions: bool = False

    def __post_init__(self, device: torch.device) -> None:
        self.host.to(device).train().learning_rate = 1e-5
        made = self.host.configure_optimizers()
        self.optimizers = list(made[0] if isinstance(made, tuple) else made)

    def __call__(self, batch: Mapping[str, Any], parts: Timer = nullcontext) -> None:
        """Update all weights on one batch; `parts` is called with the name of each part."""
        if self.new_captions:
            self.host.loss.alignment.texts.forget()
        x = self.host.get_input(batch, self.host.image_key)
        with parts("host"):
            output = self.host(x)
        for which, optimizer in enumerate(self.optimizers):
            with _only(optimizer, self.optimizers):
                if which > 0 and self.two_forward:
                    output = self.host(x)
                with parts("losses"):
                    given: Any = {"last_layer": self.host.get_last_layer(), "split": "train"}
                    loss, _ = self.host.loss(output[1], x, output[0], which, LATE, **given)
                with parts("backward"):
                    loss.backward()
                with parts("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _only(optimizer: Any, optimizers: Sequence[Any]) -> Iterator[None]:
    """Switch off gradients of parameters that other optimizers alone hold, as Lightning does."""
    held = [{p for group in each.param_groups for p in group["params"]} for each in optimizers]
    mine = held[optimizers.index(optimizer)]
    others = [p for p in set().union(*held) - mine if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


class Parts:
    """Exclusive seconds by part of a step: time in an inner part does not count for the outer."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        begin = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = self._now() - begin
            self.seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time all calls of `owner.method` from now on."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return inner(*args, **kwargs)

        object.__setattr__(owner, method, timed)

    def _now(self) -> float:
        _synchronize(self.device)
        return time.perf_counter()


def measure(
    case: Case,
    *,
    device: torch.device,
    rounds: int = 5,
    steps: int = 5,
    clip: Mapping[str, Any] = CLIP,
    progress: Any = None,
) -> Result:
    """Time a case.

    Args:
        case: one of :data:`CASES`.
        device: CPU or CUDA.
        rounds: in each, both take `steps` steps, in alternating order.
        steps: per turn, of which the mean is taken; rounded up to a multiple of `lgvq.every`.
        clip: guide block of the text tower, of cases that have it.
        progress: called after every round.
    """
    batch_size = case.batch_sizes[device.type]
    scenes = Scenes("train", size=32, length=BATCHES * batch_size)
    captions = [scenes.captions_of(i)[0] for i in range(len(scenes))]
    with TemporaryDirectory() as folder:
        guide = _guide(case, captions, Path(folder), device, clip)
        shape = (batch_size, case.size, case.size, 3)
        texts = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
        batches: list[dict[str, Any]] = [
            {"image": 2 * torch.rand(shape, device=device) - 1, "caption": some} for some in texts
        ]
        step_of = {
            "bare": Step(_host(case, None), device, two_forward=case.two_forward),
            "lgvq": Step(_host(case, guide), device, new_captions=case.new_captions),
        }
        heads = step_of["lgvq"].host.loss.alignment
        steps = -(-steps // heads.config.every) * heads.config.every
        for batch in batches:  # as in later epochs
            some = batch["caption"]
            heads.texts.encode(heads.guide, some, heads.guide.tokenize(some), [], device)
        for step in step_of.values():  # warm-up: allocations, autotuning, optimizer states
            for batch in batches[:2]:
                heads.batches = 0  # what follows is an aligned batch
                step(batch)
        memory = {name: _peak(step, batches[0], device) for name, step in step_of.items()}
        taken: dict[str, list[float]] = {name: [] for name in step_of}
        clock, order = Parts(device), [*step_of]
        for number in range(rounds):
            for name in order:
                with clock(name):
                    for i in range(number * steps, (number + 1) * steps):
                        step_of[name](batches[i % BATCHES])
                taken[name].append(clock.seconds.pop(name) / steps)
            order.reverse()
            if progress is not None:
                progress()
        parts = _parts(step_of["lgvq"], batches[: max(2, steps)], device)
    ratios = [a / b for a, b in zip(taken["lgvq"], taken["bare"], strict=True)]
    known = {name: peak for name, peak in memory.items() if peak is not None}
    every = heads.config.every
    return Result(case, batch_size, ratios, taken["bare"], taken["lgvq"], parts, known, every)


def _peak(step: Step, batch: Any, device: torch.device) -> float | None:
    """Return MiB of the step's weights and optimizer, and of what one step adds at its peak."""
    if device.type != "cuda":
        return None
    heads: Alignment | None = getattr(step.host.loss, "alignment", None)
    held = [*step.host.parameters(), *step.host.buffers()]
    held += [v for each in step.optimizers for s in each.state.values() for v in s.values()]
    held += heads.guide.weights().values() if heads is not None else []
    size = sum(each.nbytes for each in held if isinstance(each, Tensor))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if heads is not None:
        heads.batches = 0  # the next batch is aligned
    step(batch)
    _synchronize(device)
    return (size + torch.cuda.max_memory_allocated(device) - before) / 2**20


def _parts(step: Step, batches: Sequence[Any], device: torch.device) -> dict[str, float]:
    """Return seconds per aligned step by part; wraps the methods of the step's host for good."""
    parts = Parts(device)
    heads: Alignment = step.host.loss.alignment
    for method in ("encode", "encode_apart"):
        parts.wrap(heads.guide, method, "text encoder")
    parts.wrap(heads.guide, "tokenize", "tokenizer")
    is_compiled = getattr(heads.code_vit, "_compiled_call_impl", None) is not None
    parts.wrap(heads.code_vit, "_compiled_call_impl" if is_compiled else "forward", "code-ViT")
    for name, objective in heads.objectives.items():
        parts.wrap(objective, "forward", name)
    collected: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        parts.seconds.clear()
        heads.batches = 0  # the next batch is aligned
        with parts("rest"):
            step(batch, parts)
        for name, seconds in parts.seconds.items():
            collected[name].append(seconds)
    return {name: statistics.median(each) for name, each in collected.items()}


def _host(case: Case, guide: Mapping[str, Any] | None) -> nn.Module:
    """Build the bare host, or with a guide the one with LG-VQ."""
    files = shipped()
    config = read_config([files[case.config if guide is None else f"{case.config}_lgvq"]])
    model = laid_over(to_plain(config, "model")["model"], {"params": dict(case.params)})
    if guide is not None:
        block = laid_over({"guide": dict(guide)}, dict(case.lgvq))
        params = model["params"]["lossconfig"]["params"]
        params["lgvq"] = laid_over(params.get("lgvq") or {}, block)
    torch.manual_seed(0)
    return build_host({"model": model})


def _guide(
    case: Case, captions: Sequence[str], folder: Path, device: torch.device, clip: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the guide block of a case; cached features are written to `folder`."""
    if case.guide == "micro_clip":
        return {"use": "micro_clip"}
    if case.guide == "live":
        return dict(clip)
    source = build_guide(clip).to(device)
    _, written = CachedGuide.write(folder, source, captions, block={**clip, **source.config})
    for _ in written:
        pass
    return {"use": "cached", "folder": str(folder)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# How the cost of the heads grows


class RandomGuide(AbstractGuide):
    """A guide of any size with random features, for timing only.

    Args:
        length: T.
        vocabulary_size: V.
        width: Dt and Ds.
    """

    def __init__(self, length: int, vocabulary_size: int, width: int = 512):
        self.max_length, self.token_dim, self.sentence_dim = length, width, width
        self._table = torch.randn(vocabulary_size, width)

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Return random words, all positions used."""
        shape = (len(captions), self.max_length)
        word_ids = torch.arange(self.max_length).repeat(len(captions), 1) - 1
        word_ids[:, -1] = -1
        ids = torch.randint(len(self._table), shape)
        return TextTokens(ids, torch.ones(shape, dtype=torch.bool), word_ids)

    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Return random features."""
        text, device = self.tokenize(captions), self.device
        return TextFeatures(
            token_ids=text.token_ids.to(device),
            attention_mask=text.attention_mask.to(device),
            word_ids=text.word_ids.to(device),
            tokens=torch.randn(*text.token_ids.shape, self.token_dim, device=device),
            sentence=torch.randn(len(captions), self.sentence_dim, device=device),
            vocabulary=self._table,
        )

    @property
    def vocabulary(self) -> Tensor:
        """The random table, (V, Dt)."""
        return self._table

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self._table.device

    def to(self, device: torch.device | str) -> "RandomGuide":
        """Move the table."""
        self._table = self._table.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build a guide of this size."""
        return {"length": self.max_length, "vocabulary_size": len(self._table)}


@dataclass(frozen=True)
class Size:
    """Sizes that the cost of the heads depends on."""

    batch: int = 16
    tokens: int = 256
    text: int = 30
    codes: int = 1024
    vocabulary: int = 49408


GROWTH = {
    "batch": (8, 16, 32, 64),
    "tokens": (64, 256, 1024),
    "text": (8, 16, 30, 77),
    "codes": (512, 4096, 65536),
    "vocabulary": (5000, 20000, 49408),
}


def growth(
    device: torch.device, *, repeats: int = 5, block: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Time forward and backward pass of all heads while one size changes.

    Args:
        device: CPU or CUDA.
        repeats: of each size.
        block: the `lgvq:` block; default: the default recipe.

    Returns:
        Rows of {"varies", **sizes, "seconds"}: the median over `repeats`.
    """
    sizes = [(name, Size(**{name: value})) for name, values in GROWTH.items() for value in values]
    return [
        {"varies": name, **asdict(size), "seconds": _heads(size, device, repeats, block)}
        for name, size in sizes
    ]


def _heads(
    size: Size, device: torch.device, repeats: int, block: Mapping[str, Any] | None
) -> float:
    guide = RandomGuide(size.text, size.vocabulary).to(device)
    config = parse({**(block or {}), "every": 1})
    heads = Alignment(config, guide, code_dim=256).to(device)
    side = int(size.tokens**0.5)
    codebook = torch.randn(size.codes, 256, device=device)
    clock, taken = Parts(device), []
    for step in range(repeats + 1):
        indices = torch.randint(size.codes, (size.batch, size.tokens), device=device)
        vectors = codebook[indices].requires_grad_()
        codes = Codes(codes=vectors, indices=indices, grid=(side, side), codebook=codebook)
        captions = [f"caption {i} of step {step}" for i in range(size.batch)]
        with clock("heads"):
            heads(codes, captions, step=step)[0].backward()
        taken.append(clock.seconds.pop("heads"))
    return statistics.median(taken[1:])


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: processor, threads, versions, commit."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = None
    with suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip_torch": metadata.version("open_clip_torch"),
        "lgvq_plugin": metadata.version("lgvq_plugin"),
        "commit": commit,
    }
