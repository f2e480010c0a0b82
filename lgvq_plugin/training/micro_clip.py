"""Train the embedded guide `micro_clip` on the embedded scenes: CLIP's loss, minutes on a CPU.

python -m lgvq_plugin.training.micro_clip
    scenes -> image tower, text tower -> symmetric InfoNCE -> guides/_micro_clip/

The same arguments on the same machine give the same file.
"""

import argparse
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bench.metrics.retrieval import retrieval_recall
from ..functional import global_semantic_loss, seeded
from ..sockets import ConfigError, resolve

FOLDER = Path(__file__).parents[1] / "guides" / "_micro_clip"
WARMUP = 0.05  # share of the steps
JOINED = 0.2  # share of captions that are two captions of the scene, to train late positions
MASKED = 0.1  # share of words masked for the text tower, so that it knows masked words
MAX_SCALE = 100.0  # of the logits, as in CLIP


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the embedded model is trained; defaults are those of the shipped weights."""

    seed: int = 0
    """Seeds weights, scenes and batches."""
    steps: int = 700
    """Optimizer steps."""
    batch: int = 128
    """Scenes per step."""
    scenes: int = 8192
    """Training scenes."""
    held_out: int = 512
    """Scenes of the validation split, for retrieval."""
    learning_rate: float = 1e-3
    """Peak; cosine decay to 0 after a warm-up."""
    weight_decay: float = 0.1
    """For matrices only; without decay, token embeddings that get no gradient stay the same."""
    threads: int = 1
    """torch's threads; the last bits of the weights depend on it."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name in ("seed", "weight_decay") else 1e-12):
                raise ConfigError(f"micro_clip: --{name} must be positive, got {value}")


Pairs = tuple[Tensor, list[list[str]]]  # images (N, 3, S, S) in [-1, 1], captions of each


def main(argv: list[str] | None = None) -> int:
    """Run the training; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m lgvq_plugin.training.micro_clip", description=__doc__
    )
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder of the weights")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = vars(parser.parse_args(argv))
    output = given.pop("output")
    facts = train(Plan(**given), output)
    tqdm.write(f"{output}: {facts['retrieval']}")
    return 0


def train(plan: Plan, output: Path) -> dict[str, Any]:
    """Train and write the weights; returns their metadata."""
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        with seeded(plan.seed):
            return _train(plan, output)
    finally:
        torch.set_num_threads(threads)


def _train(plan: Plan, output: Path) -> dict[str, Any]:
    guide = resolve("guides", "micro_clip")
    tokenizer, network = guide.new_tokenizer(), guide.new_network(plan.seed)
    pairs = _draw("train", plan.scenes, plan.seed)
    tokens = tokenizer([caption for captions in pairs[1] for caption in captions])
    start = time.perf_counter()
    loss = _fit(network, pairs, tokenizer, plan)
    minutes = (time.perf_counter() - start) / 60
    facts = {
        **asdict(plan),
        "data": "lgvq_plugin.datasets.scenes",
        "loss": round(loss, 4),
        "retrieval": _retrieval(network, _draw("validation", plan.held_out, plan.seed), tokenizer),
        "minutes": round(minutes, 1),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "command": "python -m lgvq_plugin.training.micro_clip",
    }
    guide.save(network, tokens.unique(), output, facts)
    return facts


def _fit(network: Any, pairs: Pairs, tokenizer: Any, plan: Plan) -> float:
    """Train in place; returns the mean loss of the last tenth of the steps."""
    network.visual.to(memory_format=torch.channels_last)  # faster convolutions
    decayed, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in network.named_parameters():
        is_decayed = parameter.ndim > 1 and "embedding" not in name
        (decayed if is_decayed else others).append(parameter)
    groups: Any = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    options: Any = {"lr": plan.learning_rate, "weight_decay": plan.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, plan.steps))
    generator = torch.Generator().manual_seed(plan.seed)
    network.train()
    hook = network.text.token_embedding.register_forward_hook(
        lambda _, ids, rows: _mask(ids[0], rows, tokenizer, generator)
    )
    losses: list[float] = []
    bar = tqdm(range(plan.steps), desc="micro_clip", mininterval=2)
    for _ in bar:
        batch = torch.randperm(len(pairs[0]), generator=generator)[: plan.batch]
        captions = [_caption(pairs[1][i], generator) for i in batch.tolist()]
        loss = _clip_loss(network, pairs[0][batch], captions, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(MAX_SCALE))
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    hook.remove()
    network.eval()
    last = losses[-max(1, plan.steps // 10) :]
    return sum(last) / len(last)


def _clip_loss(network: Any, images: Tensor, captions: list[str], tokenizer: Any) -> Tensor:
    """Return CLIP's loss, which unlike our objective also trains the text tower."""
    image, text = network.encode_image(images), network.encode_text(tokenizer(captions))
    temperature = 1 / network.logit_scale.exp()
    same = torch.tensor([[a == b for b in captions] for a in captions])
    to_text = global_semantic_loss(image, text, temperature=temperature, same=same)
    to_image = global_semantic_loss(text, image, temperature=temperature, same=same)
    return (to_text + to_image) / 2


def _draw(split: str, length: int, seed: int) -> Pairs:
    size = resolve("guides", "micro_clip").image_size
    scenes = resolve("datasets", "scenes")(split, size, length, seed, channel_first=True)
    samples = [scenes[i] for i in tqdm(range(length), desc=f"scenes, {split}", mininterval=2)]
    images = torch.stack([torch.from_numpy(sample["image"]) for sample in samples])
    return images, [sample["captions"] for sample in samples]


def _caption(captions: list[str], generator: torch.Generator) -> str:
    # Where two captions meet there may be a "..", the one token whose row is not kept.
    first, second, chance = torch.rand(3, generator=generator).tolist()
    caption = captions[int(first * len(captions))]
    other = captions[int(second * len(captions))]
    return f"{caption}. {other}" if chance < JOINED else caption


def _mask(ids: Tensor, rows: Tensor, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Set some words' embeddings (B, T, Dt) to zero, nearly the vocabulary's mean."""
    is_special = torch.isin(ids, torch.tensor([0, *tokenizer.all_special_ids]))
    is_masked = (torch.rand(ids.shape, generator=generator) < MASKED) & ~is_special
    return rows.masked_fill(is_masked[..., None], 0.0)


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _retrieval(network: Any, pairs: Pairs, tokenizer: Any) -> dict[str, float]:
    """Return R@1 both ways among held-out scenes, each with its most complete caption."""
    captions = [texts[0] for texts in pairs[1]]
    image = network.encode_image(pairs[0], normalize=True)
    text = network.encode_text(tokenizer(captions), normalize=True)
    relevant = torch.tensor([[a == b for b in captions] for a in captions])
    similarity = image @ text.T
    ways = {"image_to_text": similarity, "text_to_image": similarity.T}
    recalls = {
        f"{way}_recall@1": retrieval_recall(similarity, relevant, ks=(1,))["recall@1"]
        for way, similarity in ways.items()
    }
    return {"scenes": len(captions), **recalls, "chance": 1 / len(captions)}


if __name__ == "__main__":
    raise SystemExit(main())
