"""The probes' network: a cache changes nothing, and no token sees what it must not."""

import pytest
import torch

from lgvq_plugin.bench.probes.features import FrozenCodes
from lgvq_plugin.bench.probes.trainer import ProbeConfig
from lgvq_plugin.bench.probes.transformer import (
    UNKNOWN,
    Cache,
    CodeMemory,
    Dropout,
    ProbeTransformer,
    Words,
    trim,
    used_length,
)

CONFIG = ProbeConfig(width=16, heads=2, depth=2, dropout=0.0)


@pytest.fixture
def parts():
    network = ProbeTransformer(CONFIG, vocabulary_size=11, length=7, causal=True).eval()
    return network, torch.randint(11, (3, 7)), torch.randn(3, 5, 16)


def test_one_by_one_with_a_cache_equals_all_at_once(parts):
    network, tokens, memory = parts
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    whole = network(tokens, memory, memory_mask=mask)
    cache = Cache()
    steps = [network(tokens[:, i : i + 1], memory, memory_mask=mask, cache=cache) for i in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_causal_token_does_not_see_later_ones(parts):
    network, tokens, memory = parts
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    torch.testing.assert_close(network(tokens, memory)[:, :4], network(other, memory)[:, :4])


def test_masked_memory_and_padding_do_not_matter():
    network = ProbeTransformer(CONFIG, vocabulary_size=11, length=7, causal=False).eval()
    tokens, memory = torch.randint(1, 11, (1, 7)), torch.randn(1, 5, 16)
    token_mask, memory_mask = torch.ones(1, 7).bool(), torch.ones(1, 5).bool()
    token_mask[:, 5:], memory_mask[:, 3:] = False, False
    masks = {"token_mask": token_mask, "memory_mask": memory_mask}
    first = network(tokens, memory, **masks)
    tokens[:, 5:], memory[:, 3:] = 0, 9.0
    torch.testing.assert_close(network(tokens, memory, **masks)[:, :5], first[:, :5])


def test_the_states_that_are_read_are_those_of_all():
    network = ProbeTransformer(CONFIG, vocabulary_size=11, length=7, causal=False).eval()
    tokens, memory, read = (
        torch.randint(11, (2, 7)),
        torch.randn(2, 5, 16),
        torch.tensor([[5], [0]]),
    )
    mask = torch.arange(7) < torch.tensor([[6], [4]])
    whole = network(tokens, memory, token_mask=mask)
    some = network(tokens, memory, token_mask=mask, read=read)
    torch.testing.assert_close(some[:, 0], whole[[0, 1], [5, 0]], atol=1e-5, rtol=1e-5)


def test_attention_in_training_is_that_of_evaluation_but_for_dropout():
    network = ProbeTransformer(
        ProbeConfig(width=16, heads=2, depth=1, dropout=1e-5),
        vocabulary_size=11,
        length=7,
        causal=True,
    )
    tokens, memory = torch.randint(11, (2, 7)), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for module in network.modules():
        if isinstance(module, Dropout):
            module.rate = 2.0**-40  # the path of training; nothing is dropped
    states = network.train()(tokens, memory, memory_mask=mask)
    expected = network.eval()(tokens, memory, memory_mask=mask)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop, x = Dropout(0.1).train(), torch.ones(3, 33333)
    torch.manual_seed(1)
    out = drop(x)
    torch.manual_seed(1)
    assert torch.equal(out, drop(x))
    assert (out == 0).double().mean() == pytest.approx(0.1, abs=0.004)
    assert out.mean() == pytest.approx(1, abs=0.004)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.9], abs=1e-4)
    assert drop.eval()(x) is x


def test_columns_that_no_row_uses_are_counted_off():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert used_length(mask) == 2
    assert used_length(torch.zeros(2, 3).bool()) == 0


def test_the_memory_does_not_depend_on_the_codes_scale():
    codes = torch.randn(40, 4, 6)
    torch.manual_seed(1)
    plain = CodeMemory(FrozenCodes((2, 2), vectors=codes), 16)
    torch.manual_seed(1)
    large = CodeMemory(FrozenCodes((2, 2), vectors=codes * 50 + 3), 16)
    torch.testing.assert_close(plain(codes), large(codes * 50 + 3), atol=1e-3, rtol=1e-3)


def test_words_that_training_never_had_are_unknown():
    words = Words(["a red star", "a red ring"], min_count=2)
    rows = words.encode(["a red star star star", ""], length=5)
    assert len(words) == 6
    assert rows.tolist()[0][3] == UNKNOWN
    assert words.decode(rows[0, 1:].tolist()) == "a red"
    assert trim(rows[1:]).tolist() == [[1, 2]]
