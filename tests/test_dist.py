"""Gathering over two processes (gloo): the mean gradient of DDP is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgvq_plugin.functional import gather_rows, world_size

ROOT = Path(__file__).parents[1]
SCRIPT = """
import gc
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lgvq_plugin.config import GlobalSemanticConfig, MaskedTextConfig
from lgvq_plugin.functional import gather_rows, world_size
from lgvq_plugin.objectives import Caption, GlobalSemantic, MaskedText
from lgvq_plugin.types import Codes, CodeView, TextFeatures, TextTokens

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)  # the same numbers on both ranks
IMAGES, SENTENCES = torch.randn(6, 4), torch.randn(6, 5)
TOKEN_IDS = torch.arange(6)[:, None].repeat(1, 3)
TOKEN_IDS[5], SENTENCES[5] = TOKEN_IDS[0], SENTENCES[0]  # the same caption on another rank


class Net(nn.Module):
    def __init__(self, **knobs):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(4, 7)
        config = GlobalSemanticConfig(temperature=0.3, **knobs)
        self.objective = GlobalSemantic(
            config, guide=SimpleNamespace(token_dim=7, sentence_dim=5), code_dim=7)

    def forward(self, rows, present):
        cls = self.encoder(IMAGES[rows])
        ids = TOKEN_IDS[rows]
        real = torch.ones_like(ids, dtype=torch.bool)
        text = TextFeatures(ids, real, ids, ids, SENTENCES[rows], SENTENCES)
        view = CodeView(Codes(cls[:, None], None, (1, 1)), cls, cls[:, None])
        strings = ["text" if known else "" for known in present[rows]]
        return self.objective(view, Caption(strings, TextTokens(ids, real, ids), text, None, None))


def gradients(net):
    named = ((n.removeprefix("module."), p.grad) for n, p in net.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


CASES = {  # rows of the two ranks, and who has a caption
    "even": ([0, 1, 2], [3, 4, 5], [1, 1, 1, 1, 1, 1]),
    "uneven": ([0, 1, 2, 3], [4, 5], [1, 1, 1, 1, 1, 1]),
    "no rows": ([0, 1, 2, 3, 4, 5], [], [1, 1, 1, 1, 1, 1]),
    "no captions": ([0, 1, 2], [3, 4, 5], [0, 0, 0, 1, 1, 1]),
    "some captions": ([0, 1, 2], [3, 4, 5], [0, 1, 1, 1, 0, 1]),
    "one caption": ([0, 1, 2], [3, 4, 5], [0, 0, 0, 1, 0, 0]),
    "none at all": ([0, 1, 2], [3, 4, 5], [0, 0, 0, 0, 0, 0]),
}
KNOBS = [{}, {"symmetric": False}, {"exclude_same": False}, {"learnable_temperature": False}]
expected = {}
for case, (first, second, present) in CASES.items():
    for number, knobs in enumerate(KNOBS):
        whole = Net(**knobs)
        term = whole(torch.tensor(first + second), torch.tensor(present).bool())
        term.value.backward()
        expected[case, number] = term, gradients(whole)

dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
assert world_size() == 2

for case, (*rows, present) in CASES.items():
    for number, knobs in enumerate(KNOBS):
        whole, right = expected[case, number]
        mine = torch.tensor(rows[rank], dtype=torch.long), torch.tensor(present).bool()
        net = DistributedDataParallel(Net(**knobs))
        term = net(*mine)
        term.value.backward()
        assert torch.allclose(term.value, whole.value, atol=1e-6), (case, knobs)
        assert torch.allclose(term.log["retrieval_top1"], whole.log["retrieval_top1"])
        found = gradients(net)
        assert found.keys() == right.keys(), (case, knobs)
        for name in right:
            assert torch.allclose(found[name], right[name], atol=1e-6), (case, knobs, name)

# It is the gathering that does it: without, the gradient is another one.
first, second, present = CASES["even"]
net = DistributedDataParallel(Net(gather=False))
net(torch.tensor([first, second][rank]), torch.tensor(present).bool()).value.backward()
found, right = gradients(net), expected["even", 0][1]
assert not torch.allclose(found["encoder.weight"], right["encoder.weight"])

# Rows in the order of the ranks, of any type; backward sums what the ranks say.
rows = torch.full((1 + rank, 2), float(rank), requires_grad=True)
(everything,) = gather_rows(rows)
assert everything.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
(everything * (rank + 1) * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
assert rows.grad[:, 0].tolist() == ([3.0] if rank == 0 else [30.0, 300.0])
assert gather_rows(torch.tensor([rank, 7]))[0].tolist() == [0, 7, 1, 7]
assert gather_rows(torch.zeros(0, 3))[0].shape == (0, 3)
# Words to choose from are those of all ranks.
guide = SimpleNamespace(token_dim=8, max_length=3, vocabulary=torch.randn(20, 8))
objective = MaskedText(MaskedTextConfig(), guide=guide, code_dim=8)
for step, expected_words in ((0, [2, 3, 7, 8]), (1, [2, 3, 4, 7, 8, 9])):
    ids = torch.tensor([[0, 2 + 5 * rank + step, 3 + 5 * rank + step]])
    words = TextTokens(ids, ids >= 0, torch.tensor([[-1, 0, 1]]))
    assert objective._words_seen(words, torch.device("cpu")).tolist() == expected_words
assert objective.seen.nonzero().flatten().tolist() == expected_words

# A net of DDP holds the group, whose threads must not outlive it: let go before the group ends.
del net
gc.collect()
dist.barrier()
dist.destroy_process_group()
print("done")
"""


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import lgvq_plugin

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
CAPTIONS = ["a red square", "two blue circles", "a green ring", "a star"]


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)

    def forward(self, z):
        distance = (z.movedim(1, -1)[..., None, :] - self.embedding.weight).square().sum(-1)
        indices = distance.argmin(-1)
        codes = self.embedding(indices).movedim(-1, 1)
        commit = (z - codes.detach()).square().mean() + (z.detach() - codes).square().mean()
        return z + (codes - z).detach(), indices, commit


class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
        self.quantize = Quantizer()

    def forward(self, x):
        quantized, _, commit = self.quantize(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + commit


def train(rows, sharded):
    torch.manual_seed(0)
    model = Tokenizer()
    objectives = {"global_semantic": {"weight": 0.5}, "relationship": {"weight": 0}}
    handle = lgvq_plugin.attach(
        model, guide={"use": "micro_clip"}, objectives=objectives, gradient_ratio=None)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *handle.parameters()], lr=0.1)
    for _ in range(3):
        (model(IMAGES[rows]) + handle.loss(CAPTIONS[rows])[0]).backward()
        for p in handle.parameters() if sharded else []:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    named = [*model.named_parameters(), *handle.heads.named_parameters()]
    return {name: p.full_tensor() if sharded and isinstance(p, DTensor) else p for name, p in named}


expected = train(slice(None), False)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
result = train(slice(2 * rank, 2 * rank + 2), True)
assert result.keys() == expected.keys()
torch.manual_seed(0)
start = dict(Tokenizer().named_parameters())
for name, value in expected.items():
    torch.testing.assert_close(result[name], value, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")
for name in ("encoder.weight", "quantize.embedding.weight"):
    assert (start[name] - expected[name]).abs().max() > 1e-3, name
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", [SCRIPT, SHARDED], ids=["gathered", "fsdp"])
def test_two_processes(tmp_path, source):
    script = tmp_path / "ranks.py"
    script.write_text(source)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", script, str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
    assert all("done" in text for text in told)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (2,)])
def test_one_process_gathers_nothing(shape):
    rows = torch.randn(shape, requires_grad=True)
    assert world_size() == 1
    assert gather_rows(rows)[0] is rows
