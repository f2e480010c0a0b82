"""What a copy of the logits costs L_mtp: those of hidden words alone, or the same through a mask.

    python tests/benchmarks/bench_masked_text.py [-o results/masked_text.json]

Forward and backward of output matrix and loss. Both take turns in one process, so that a busy
machine slows both.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from lgvq_plugin.functional import masked_text_loss

ROUNDS, WORDS, WIDTH = 10, 300, 384
VOCABULARIES = {"MiniLM": 30522, "CLIP": 49408}


def seconds(vocabulary, bias, targets, *, copied):
    hidden = torch.randn(len(targets), WIDTH, requires_grad=True)
    begin = time.perf_counter()
    logits = hidden @ vocabulary.mT + bias
    mask = torch.ones_like(targets, dtype=torch.bool) if copied else None
    masked_text_loss(logits, targets, mask).backward()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", type=Path, default=Path(__file__).parent / "results/masked_text.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, size in VOCABULARIES.items():
        vocabulary, bias = torch.randn(size, WIDTH), torch.zeros(size, requires_grad=True)
        targets = torch.randint(size, (WORDS,))
        taken = {True: [], False: []}
        for turn in range(2 * ROUNDS):
            copied = turn % 2 == 0
            taken[copied].append(seconds(vocabulary, bias, targets, copied=copied))
        copy, none = (statistics.median(taken[copied]) for copied in (True, False))
        results[name] = {"words": size, "seconds": none, "with_a_copy": copy, "ratio": copy / none}
    results["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    given.o.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
