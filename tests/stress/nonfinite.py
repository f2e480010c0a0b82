"""Put NaN, infinity or 1e30 into every place of a training, and look for it in the checkpoints.

    python tests/stress/nonfinite.py [--only term gradient ...]

A case is a place (a term, a loss, a gradient, text features, a weight of the heads, an image, ...),
a value, `lgvq.on_nonfinite`, and whether the value comes once or in every step from then on. A
run must end, or fail with a FloatingPointError that names the step and the place; every number in
every checkpoint is finite in any case. `skip` must give up after a number of steps in a row.
"""

import argparse
import contextlib
import logging
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).parents[1] / "hosts"))  # last: it has a conftest
from lookalikes import toy_guide

from lgvq_plugin import objectives
from lgvq_plugin.functional import MAX_SKIPPED
from lgvq_plugin.hosts.vqvae import VQVAELoss
from lgvq_plugin.training import driver, state
from lgvq_plugin.training.run import train

VALUES = {"nan": math.nan, "inf": math.inf, "huge": 1e30}
STEP = 2
"""The first step with a bad number; the steps before it are saved."""
TERMS = {
    "global_semantic": objectives.GlobalSemantic,
    "masked_text": objectives.MaskedText,
    "relationship": objectives.Relationship,
}
PARTS = ("encoder", "decoder", "loss.lgvq")
PLACES = {  # place: what the error must name
    **{f"term {name}": name for name in TERMS},
    "loss": "aeloss",
    **{f"gradient {part}": part.rpartition(".")[2] for part in PARTS},
    "text tokens": "masked_text|relationship|heads",
    "text sentence": "global_semantic|relationship|heads",
    "weight": "code_vit|heads|global_semantic",
    "image": "rec_loss|encoder|objective",
    "buffer": "weights are not finite|quantize|rec_loss|objective",
}


@dataclass(frozen=True)
class Case:
    """One bad number."""

    place: str
    value: str
    how: str  # raise, skip
    stays: bool = False

    def __str__(self) -> str:
        return f"{self.place}, {self.value}, {self.how}{', stays' * self.stays}"


def every_case() -> list[Case]:
    """Return all cases; what stays is tried for NaN."""
    once = [Case(*each) for each in product(PLACES, VALUES, ("raise", "skip"))]
    return once + [Case(place, "nan", "skip", True) for place in PLACES]


def config(case: Case) -> dict[str, Any]:
    """Return the config of a VQ-VAE with all state there is: EMA, queue, moving averages."""
    lgvq = {
        "guide": {"use": "lookalikes.toy_guide:ToyGuide"},
        "stop": None,
        "every": 1,  # the value comes at one step, and skip gives up within the steps of a case
        "on_nonfinite": case.how,
        "objectives": {
            "global_semantic": {"weight": 0.05, "queue": 8},
            "masked_text": {"weight": 0.05},
            "relationship": {"weight": 0.05},
        },
    }
    scenes = {"target": "scenes", "params": {"size": 16, "length": 8}}
    return {
        "model": {
            "learning_rate": 1e-3,
            "target": "lgvq_plugin.hosts.vqvae.VQVAE",
            "params": {
                **{"n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1},
                **{"downsample": 4, "quantizer": "ema"},
                "lossconfig": {
                    "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
                    "params": {"lgvq": lgvq},
                },
            },
        },
        "data": {"batch_size": 2, "train": scenes},
        "training": {
            **{"max_steps": STEP + (MAX_SKIPPED + 5 if case.stays else 2), "accelerator": "cpu"},
            **{"val_every": None, "images_every": None, "log_every": 1, "ema_decay": 0.9},
            "checkpoint_every": 1,
            "keep_checkpoints": None,
        },
    }


@contextlib.contextmanager
def injected(case: Case) -> Iterator[None]:
    """Put the number of a case into its place, from step STEP on."""
    value, step = VALUES[case.value], [0]
    inner = driver.HostDriver._train_on
    backward, forward = driver.HostDriver.manual_backward, driver.HostDriver._forward
    kind, _, name = case.place.partition(" ")

    def is_now() -> bool:
        return step[0] >= STEP if case.stays else step[0] == STEP

    def train_on(self: Any, batch: Any) -> None:
        step[0] = self.global_step
        module = {"weight": "loss.lgvq.code_vit", "buffer": "quantize"}.get(kind)
        if is_now() and module:
            part = self.host.get_submodule(module)
            found = part.parameters() if kind == "weight" else part.buffers()
            next(t for t in found if t.is_floating_point()).data.view(-1)[0] = value
        inner(self, batch)

    def with_gradient(self: Any, loss: Any, *args: Any, **kwargs: Any) -> None:
        backward(self, loss, *args, **kwargs)
        if kind == "gradient" and is_now():
            for parameter in self.host.get_submodule(name).parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = value
                    break

    def with_image(self: Any, batch: Any) -> Any:
        if kind == "image" and is_now():
            batch = {**batch, "image": batch["image"].clone()}
            batch["image"].view(-1)[0] = value
        return forward(self, batch)

    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(patch.object(driver.HostDriver, "_train_on", train_on))
        put(patch.object(driver.HostDriver, "manual_backward", with_gradient))
        put(patch.object(driver.HostDriver, "_forward", with_image))
        if kind == "term":
            of = TERMS[name].forward

            def with_term(self: Any, *args: Any) -> Any:
                term = of(self, *args)
                return replace(term, value=term.value * value) if is_now() else term

            put(patch.object(TERMS[name], "forward", with_term))
        if kind == "loss":
            of_host = VQVAELoss.forward

            def with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
                loss, log = of_host(self, *args, **kwargs)
                return (loss * value if is_now() else loss), log

            put(patch.object(VQVAELoss, "forward", with_loss))
        if kind == "text":
            encode = toy_guide.ToyGuide.encode

            def with_text(self: Any, *args: Any, **kwargs: Any) -> Any:
                features = encode(self, *args, **kwargs)
                if is_now():
                    bad = getattr(features, name).clone()
                    bad[0, ..., 0] = value
                    features = replace(features, **{name: bad})
                return features

            put(patch.object(toy_guide.ToyGuide, "encode", with_text))
        yield


def not_finite(node: Any, where: str = "") -> Iterator[str]:
    """Yield the places in a checkpoint that hold a number that is not finite."""
    if isinstance(node, torch.Tensor):
        if node.is_floating_point() and not node.isfinite().all():
            yield where
    elif isinstance(node, float):
        if not math.isfinite(node):
            yield where
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from not_finite(value, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for key, value in enumerate(node):
            yield from not_finite(value, f"{where}[{key}]")


def try_case(case: Case, folder: Path) -> tuple[str, list[str]]:
    """Train with a bad number; return how the run ended, and the faults."""
    faults, message = [], ""
    with injected(case):
        try:
            train(config(case), name="a", logdir=folder, progress=False)
            ended = "went on"
        except FloatingPointError as error:
            ended, message = "stopped", str(error)
        except Exception as error:
            return "failed", [f"{type(error).__name__}: {error}"]
    if ended == "stopped":
        step = re.search(r"step (\d+)", message)
        last = STEP + (MAX_SKIPPED if case.stays else 2)
        if not step or not STEP <= int(step[1]) <= last:
            faults.append(f"the error does not name the step: {message}")
        seen = "|heads|encoder" * (case.value == "huge")  # finite terms, gradients that are not
        if not re.search(PLACES[case.place] + seen, message):
            faults.append(f"the error does not name the place: {message}")
        if case.stays and int(step[1] if step else 0) > STEP + 5 and "in a row" not in message:
            faults.append(f"the error does not say that updates were skipped: {message}")
    elif case.stays:
        faults.append("skip never gave up")
    elif case.how == "raise" and case.value != "huge":
        faults.append("the run went on")
    saved = state.candidates(folder / "a")
    if not saved:
        faults.append("no checkpoint")
    for path in saved:
        content = torch.load(path, weights_only=True)
        faults += [f"{path.name}: {where} is not finite" for where in not_finite(content)]
    return ended, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="places that start so")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cases = [case for case in every_case() if case.place.startswith(tuple(given.only))]
    table: dict[str, Counter] = {}
    failed, begin = [], time.monotonic()
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            ended, faults = try_case(case, Path(folder))
        table.setdefault(case.place, Counter())[f"{case.how}: {ended}"] += 1
        failed += [f"{case}: {fault}" for fault in faults]
        print(f"{number + 1}/{len(cases)} {case}: {ended} {'; '.join(faults)[:400]}", flush=True)
    print()
    for place, counts in table.items():
        print(f"{place:<22}" + ", ".join(f"{key} {n}" for key, n in sorted(counts.items())))
    seconds = time.monotonic() - begin
    print(f"{len(cases)} cases in {seconds:.0f} s, {len(failed)} faults", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
