"""Disk, time and memory of the cache of text features.

    python tests/benchmarks/bench_cache.py [--captions FILE.jsonl] [-o results/cache.json]

`encoder`: the ViT-B/32 text tower with random weights on captions of FILE (of the rendered scenes
by default); a cache is built against the tower alone on the same captions, in turns. The
vocabulary, written once per cache, is timed apart.
`synthetic`: a guide of the same sizes without a network, for 1,000, 10,000 and 100,000 captions;
each size in a process of its own, so that peak memory is that of one size.
Times are processor times of one thread, so that other jobs on the machine do not count.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.guides.base import AbstractGuide, build_guide
from lgvq_plugin.guides.cached import CachedGuide
from lgvq_plugin.types import TextFeatures, TextTokens

CLIP = {"use": "open_clip", "model": "ViT-B-32", "pretrained": None}
SIZES = (1_000, 10_000, 100_000)
BATCH, LOOK_UPS, ROUNDS = 16, 100, 3
RATIO = (0.15, 0.5)


class SyntheticGuide(AbstractGuide):
    """Random features of the sizes of CLIP ViT-B/32; one token per word."""

    max_length, token_dim, sentence_dim = 30, 512, 512

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._features = torch.randn(257, 30, 512, generator=generator)
        self._vocabulary = torch.randn(1000, 512, generator=generator)

    def tokenize(self, captions):
        lengths = torch.tensor([2 + len(caption.split()) for caption in captions])
        places = torch.arange(self.max_length).expand(len(captions), -1)
        attention = places < lengths[:, None]
        words = (places - 1).where((places > 0) & (places < lengths[:, None] - 1), -1)
        return TextTokens(places.where(attention, 0), attention, words)

    def encode(self, captions, token_mask=None):
        text = self.tokenize(captions)
        features = self._features[: len(captions)]
        return TextFeatures(
            text.token_ids,
            text.attention_mask,
            text.word_ids,
            features,
            features[:, 0],
            self._vocabulary,
        )

    @property
    def vocabulary(self):
        return self._vocabulary

    @property
    def device(self):
        return torch.device("cpu")

    def to(self, device):
        return self

    @property
    def config(self):
        return {}


def build(folder, guide, captions, block, **options):
    """Return the seconds that a cache takes."""
    start = time.process_time()
    _, steps = CachedGuide.write(folder, guide, captions, block=block, **options)
    for _ in steps:
        pass
    return time.process_time() - start


def kilobytes(folder, count):
    """Return kB per caption of the shards, and of the vocabulary."""
    shards = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return shards / count / 1e3, (folder / "vocabulary.safetensors").stat().st_size / count / 1e3


def look_up(cached, captions):
    """Return the median milliseconds of a step: a batch whole and, if there are masks, masked."""
    order, taken = np.random.default_rng(0), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(LOOK_UPS):
        batch = [captions[i] for i in order.choice(len(captions), BATCH)]
        start = time.process_time()
        words = cached.encode(batch).word_ids
        if cached.facts.maskings:
            mask = cached.draw_mask(batch, words, ratio=RATIO, generator=generator)
            cached.encode(batch, token_mask=mask)
        taken.append(1e3 * (time.process_time() - start))
    return statistics.median(taken)


def peak():
    """Return the process's peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def synthetic(count):
    """Return disk, speed and memory for `count` captions."""
    draws = np.random.default_rng(0)
    captions = [" ".join([f"{i}", *["word"] * draws.integers(9, 14)]) for i in range(count)]
    guide = SyntheticGuide()
    CachedGuide.write(Path(tempfile.mkdtemp()), guide, captions[:1], block={})
    with tempfile.TemporaryDirectory() as scratch:
        folder, before = Path(scratch) / "cache", peak()
        seconds = build(folder, guide, captions, {"use": "synthetic"}, maskings=0)
        after = peak()
        start = time.process_time()
        cached = CachedGuide(str(folder), verify=False)
        opening = time.process_time() - start
        return {
            "captions": count,
            "kilobytes_per_caption": kilobytes(folder, len(cached))[0],
            "milliseconds_to_pack_a_caption": 1e3 * seconds / count,
            "extra_peak_megabytes_to_build": after - before,
            "seconds_to_open": opening,
            "milliseconds_to_look_up_a_batch": look_up(cached, captions),
        }


def encoder(captions, maskings):
    """Return disk, look-up and throughput against the tower alone, in turns, by precision."""
    guide = build_guide(CLIP)
    guide.encode(captions[:BATCH])
    assert guide.fingerprint  # it is computed once per guide
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(ROUNDS):
            start = time.process_time()
            for _ in range(maskings + 1):
                guide.encode(captions)
            bare = time.process_time() - start
            folder = Path(scratch) / f"cache{turn}"
            once = build(folder, guide, [], CLIP, maskings=maskings)
            ratios.append(bare / build(folder, guide, captions, CLIP, maskings=maskings))
        cached = CachedGuide(str(folder), verify=False)
        shards, vocabulary = kilobytes(folder, len(cached))
        both, live = [each.encode(captions) for each in (guide, cached)], []
        real = both[0].attention_mask
        tokens = [features.tokens[real] for features in both]
        for _ in range(ROUNDS):
            start = time.process_time()
            guide.encode(captions[:BATCH])
            live.append(1e3 * (time.process_time() - start))
        return {
            "captions": len(captions),
            "maskings": maskings,
            "tokens_per_caption": float(real.sum() / len(real)),
            "cosine_of_tokens": float(torch.cosine_similarity(*tokens, dim=1).mean()),
            "kilobytes_per_caption": shards,
            "kilobytes_of_the_vocabulary": vocabulary * len(cached),
            "seconds_to_begin_with_the_vocabulary": once,
            "throughput_to_bare_encoder": [min(ratios), statistics.median(ratios), max(ratios)],
            "milliseconds_to_look_up_a_batch": look_up(cached, captions),
            "milliseconds_to_encode_a_batch": statistics.median(live),
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=Path, help="captions.jsonl of a data set")
    parser.add_argument("--count", type=int, default=128, help="captions for the tower")
    parser.add_argument("--synthetic", type=int, help="this size alone, as JSON")
    parser.add_argument("-o", type=Path, default=Path(__file__).parent / "results/cache.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.synthetic:
        print(json.dumps(synthetic(given.synthetic)))
        return
    if given.captions:
        lines = given.captions.read_text().splitlines()
        captions = [json.loads(line)["captions"][0] for line in lines][: given.count]
    else:
        scenes = Scenes("train", size=32, length=given.count)
        captions = [scenes.captions_of(i)[0] for i in range(given.count)]
    command = [sys.executable, __file__, "--synthetic"]
    results = {
        "synthetic": [json.loads(subprocess.check_output([*command, str(n)])) for n in SIZES],
        "encoder": [encoder(captions, maskings) for maskings in (0, 4)],
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
        },
    }
    given.o.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
