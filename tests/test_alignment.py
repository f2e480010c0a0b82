"""The schedule of the text losses: start, ramp, stop; and how hard they pull."""

import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from lgvq_plugin import attach
from lgvq_plugin.alignment import Alignment, CaptionEncoder
from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.guides.cached import CachedGuide
from lgvq_plugin.hosts.vqvae import VectorQuantizer
from lgvq_plugin.objectives import rename_old_heads
from lgvq_plugin.quantizer_hook import GradientBalance
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.types import Codes

ONLY = {"global_semantic": {"weight": 1}, "masked_text": {"weight": 0}}
CAPTIONS = ["a red circle", "two blue stars"]


@pytest.fixture(scope="module")
def total_at():
    guide = build_guide({"use": "micro_clip"})
    codes = Codes(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), None, (2, 2))

    def total(step, split="train", **options):
        config = parse({"objectives": {**ONLY, "relationship": {"weight": 0}}, **options})
        alignment = Alignment(config, guide, code_dim=8)
        return alignment(codes, CAPTIONS, step=step, split=split)[0]

    return total


def test_weights_grow_after_start_and_are_gone_from_stop_on(total_at):
    whole = total_at(0).item()
    options = {"start": 2, "ramp": 3, "stop": 8}
    shares = [total_at(step, **options).item() / whole for step in range(10)]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0], abs=1e-6)


def shares_of(block, length, steps, first=0, **options):
    """Schedule's factor at `steps` of a run of `length` steps whose heads began at `first`."""
    config = parse({**block, "objectives": {**ONLY, "relationship": {"weight": 0}}})
    heads = Alignment(config, build_guide({"use": "micro_clip"}), code_dim=8)
    codes = Codes(torch.zeros(2, 4, 8), None, (2, 2))
    heads(codes, CAPTIONS, step=first, progress=length and (first, length), **options)
    balance = GradientBalance(1.0)
    scales = []
    for step in steps:
        progress = length and (step, length)
        heads(codes, CAPTIONS, step=step, progress=progress, balance=balance)
        scales.append(balance.scale)
    return scales


def test_shares_are_of_the_run():
    given = {"start": 0.2, "ramp": 0.2, "stop": 0.5}
    scales = shares_of(given, 100, [0, 19, 20, 30, 40, 49, 50, 99])
    assert scales == pytest.approx([0, 0, 0, 0.5, 1, 1, 0, 0], abs=1e-6)


@pytest.mark.slow
def test_by_default_the_last_part_of_the_run_is_without_alignment():
    assert shares_of({}, 1000, [0, 699, 700, 999]) == [1, 1, 0, 0]
    assert shares_of({"start": 0.2}, 1000, [199, 200, 699, 700]) == [0, 1, 1, 0]
    # Where that is not known, or would be before the start, the objectives act to the end.
    assert shares_of({}, None, [0, 1, 10_000]) == [1, 1, 1]
    assert shares_of({"start": 800}, 1000, [700, 800, 999]) == [0, 1, 1]
    assert shares_of({"start": 0.9}, 1000, [899, 900, 999]) == [0, 1, 1]
    assert shares_of({"stop": None}, 1000, [0, 999]) == [1, 1]
    assert shares_of({"recipe": "paper"}, 1000, [0, 999]) == [1, 1]


def test_a_share_counts_from_the_first_step_of_the_heads():
    # A host that was trained for 600 of 1,000 steps before it got the heads.
    assert shares_of({"stop": 0.35}, 1000, [601, 739, 740, 999], first=600) == [1, 1, 0, 0]


def test_a_share_of_a_run_of_unknown_length_is_an_error():
    expected = r"lgvq\.ramp: 0\.1, lgvq\.stop: 0\.35 needs the length.*set lgvq\.total_steps"
    with pytest.raises(ConfigError, match=expected):
        shares_of({"ramp": 0.1, "stop": 0.35}, None, [])


def test_a_ramp_in_shares_needs_the_length_whatever_the_stop():
    with pytest.raises(ConfigError, match=r"^lgvq\.ramp: 0\.1 needs the length"):
        shares_of({"ramp": 0.1}, None, [])


def test_a_start_in_steps_after_the_end_in_shares_is_an_error():
    with pytest.raises(ConfigError, match=r"lgvq\.stop: 0\.35 .*is not after lgvq\.start: 400"):
        shares_of({"start": 400, "stop": 0.35}, 1000, [])


def test_the_first_step_survives_a_checkpoint():
    config = parse({"objectives": {**ONLY, "relationship": {"weight": 0}}, "stop": 0.35})
    guide = build_guide({"use": "micro_clip"})
    codes = Codes(torch.zeros(2, 4, 8), None, (2, 2))
    heads, again = (Alignment(config, guide, code_dim=8) for _ in range(2))
    heads(codes, CAPTIONS, step=600, progress=(600, 1000))
    again.load_state_dict(heads.state_dict())
    balance = GradientBalance(1.0)
    for step, scale in ((739, 1), (740, 0)):
        again(codes, CAPTIONS, step=step, progress=(step, 1000), balance=balance)
        assert balance.scale == scale
    old = {k: v for k, v in heads.state_dict().items() if k != "first_step"}  # version 0.1
    again.load_state_dict(old)
    assert again.first_step == -1


def test_validation_is_measured_whole_at_any_step(total_at):
    options = {"start": 2, "ramp": 3, "stop": 8, "split": "val"}
    whole = total_at(0, split="val").item()
    assert [total_at(step, **options).item() for step in (0, 9)] == pytest.approx([whole] * 2)


def test_before_start_and_from_stop_on_there_is_nothing_to_train(total_at):
    for step in (1, 8):
        assert not total_at(step, start=2, stop=8).requires_grad
    assert total_at(5, start=2, stop=8).requires_grad


def test_a_ratio_follows_the_schedule_and_is_told():
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    handle = attach(
        model,
        "1",
        guide={"use": "micro_clip"},
        objectives={**ONLY, "relationship": {"weight": 0}},
        gradient_ratio=2.0,
        every=1,
        ramp=3,
    )
    model.eval()  # the codebook stays as it is
    start = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    lengths = []
    for step in (0, 1, 3, 9):
        z = start.clone().requires_grad_()
        output, quantizer_loss, _ = model(z)
        loss, log = handle.loss(CAPTIONS, step=step)
        ((output * pull).sum() + 0 * quantizer_loss + loss).backward()
        lengths.append(float((z.grad - pull).norm() / pull.norm()))
        assert ("train/lgvq/gradient_ratio" in log) == (step > 0)
    assert lengths == pytest.approx([0.5, 1.0, 2.0, 2.0], rel=1e-4)
    z = start.clone().requires_grad_()
    (model(z)[0] * pull).sum().backward()  # a pass without our loss: the host's gradient alone
    assert torch.equal(z.grad, pull)


def every_nth(n, steps, *, ratio=2.0, only_heads=False, **options):
    """Length of our gradient in units of the host's in batches at `steps`, and what is logged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    objectives = {**ONLY, "relationship": {"weight": 0}}
    handle = attach(
        model,
        "1",
        guide={"use": "micro_clip"},
        objectives=objectives,
        gradient_ratio=ratio,
        every=n,
        **options,
    )
    model.eval()  # the codebook stays as it is
    start = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    lengths, logged = [], []
    for step in steps:
        z = start.clone().requires_grad_(not only_heads)
        output, quantizer_loss, _ = model(z)
        loss, log = handle.loss(CAPTIONS, step=step)
        logged.append("train/lgvq/global_semantic" in log)
        if only_heads:
            lengths.append(loss.item())
            continue
        ((output * pull).sum() + 0 * quantizer_loss + loss).backward()
        lengths.append(float((z.grad - pull).norm() / pull.norm()))
    return lengths, logged


def test_every_nth_batch_pulls_n_times_as_hard():
    lengths, logged = every_nth(3, range(7))
    assert lengths == pytest.approx([2, 0, 6, 0, 0, 6, 0], rel=1e-4)  # the first: once as hard
    assert logged == [True, False, True, False, False, True, False]
    # Without a ratio the weight is n times as large, and the mean over n batches is the same.
    one, _ = every_nth(1, range(6), ratio=None)
    three, _ = every_nth(3, range(6), ratio=None)
    assert [*three[:3], three[5]] == pytest.approx([one[0], 0, 3 * one[2], 3 * one[5]], rel=1e-4)


def test_batches_are_counted_whatever_the_steps_are_called():
    expected = [True, False, True, False, False, True]
    # Two optimizers: Lightning counts two steps a batch, from 0 or from 1.
    assert every_nth(3, range(0, 12, 2))[1] == every_nth(3, range(1, 13, 2))[1] == expected
    # Accumulated gradients, and a host that always gives the same number.
    assert every_nth(3, [0, 0, 1, 1, 2, 2])[1] == every_nth(3, [5] * 6)[1] == expected


def test_the_first_batch_of_a_window_is_aligned():
    logged = every_nth(5, range(12), start=3, stop=7)[1]
    assert [step for step in range(12) if logged[step]] == [3]
    logged = every_nth(3, range(12), start=2, stop=10)[1]
    assert [step for step in range(12) if logged[step]] == [2, 4, 7]


def test_heads_that_train_alone_train_in_every_batch():
    every, logged = every_nth(4, [0, 1, 2, 3, 4], only_heads=True)
    one, _ = every_nth(1, [0, 1, 2, 3, 4], only_heads=True)
    assert all(logged)
    assert every == pytest.approx(one)


def test_every_is_a_whole_number_from_1():
    for wrong in (0, -1, 1.5, "2x"):
        with pytest.raises(ConfigError, match=r"lgvq\.every: expected"):
            parse({"every": wrong})


def test_a_ratio_beside_a_codebook_gradient_is_refused():
    with pytest.raises(ConfigError, match="gradient_ratio: expected null with codebook_gradient"):
        parse({"gradient_ratio": 1.0, "codebook_gradient": True})
    with pytest.raises(
        ConfigError, match=r"gradient_ratio: expected > 0 and <= 1000, or null, got 0\.0"
    ):
        parse({"gradient_ratio": 0.0})


def test_a_configured_grid_that_is_not_the_codes_is_interpolated_with_a_warning(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))
    handle = attach(model, "1", grid=[2, 2], guide={"use": "micro_clip"})
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32))
        assert handle.loss(CAPTIONS)[0].isfinite()
    warnings = [r.message for r in caplog.records if "lgvq.grid" in r.message]
    assert len(warnings) == 1
    assert "lgvq.grid: [2, 2], but the codes have a 8 x 8 grid" in warnings[0]
    assert "set lgvq.grid: [8, 8]" in warnings[0]


NAMES_OF_0_1 = {
    "code_vit.in_proj.": "code_vit.enter.",
    "code_vit.in_norm.": "code_vit.enter_norm.",
    "code_vit.pos_embed": "code_vit.positions",
    "code_vit.out_norm.": "code_vit.norm.",
    "objectives.masked_text.decoder.in_proj.": "objectives.masked_text.decoder.enter.",
    "objectives.global_semantic.queue.": "objectives.global_semantic.memory.",
}


def as_saved_by_0_1(state):
    """Return a state dict with the names of version 0.1.0."""
    renamed = {}
    for key, value in state.items():
        for new, old in NAMES_OF_0_1.items():
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


def test_heads_saved_under_old_names_still_load(tmp_path):
    from safetensors.torch import save_file

    options = {
        "guide": {"use": "micro_clip"},
        "code_vit": {"width": 16},
        "objectives": {"global_semantic": {"queue": 4}},
    }

    def build(seed):
        return attach(nn.Sequential(VectorQuantizer(16, 8)), "0", seed=seed, **options)

    saved, fresh = build(0).heads.state_dict(), build(1)
    old = as_saved_by_0_1(saved)
    assert sum(key not in saved for key in old) >= 11  # also the tensors of projection and queue
    save_file(old, tmp_path / "lgvq_heads.safetensors")
    fresh.load_pretrained(tmp_path)
    assert all(torch.equal(saved[key], value) for key, value in fresh.heads.state_dict().items())
    run = {f"loss.lgvq.{key}": value for key, value in old.items()} | {"encoder.enter.a": 1}
    rename_old_heads(run)
    assert run.keys() == {*(f"loss.lgvq.{key}" for key in saved), "encoder.enter.a"}


class Calls:
    """Records the captions that a guide encodes."""

    def __init__(self, guide, monkeypatch):
        self.calls, encode = [], guide._encode

        def recorded(captions, token_mask, *, at_once):
            self.calls.append(list(captions))
            return encode(captions, token_mask, at_once=at_once)

        monkeypatch.setattr(guide, "_encode", recorded)

    def take(self):
        """Return the captions of each call since the last time."""
        taken, self.calls = self.calls, []
        return taken


CPU = torch.device("cpu")
BATCH = ["a red circle above a blue star", "", "two stars", "a red circle above a blue star"]


@pytest.fixture
def guide():
    return build_guide({"use": "micro_clip"})


@pytest.mark.parametrize("tokens", [False, True])
def test_captions_are_encoded_once_and_masked_ones_in_one_call(guide, monkeypatch, tokens):
    texts = guide.tokenize(BATCH)
    mask = texts.word_ids == 1
    expected, expected_masked = guide.encode(BATCH), guide.encode(BATCH, mask)
    encoder = CaptionEncoder(tokens=tokens, megabytes=1)
    calls = Calls(guide, monkeypatch)
    for epoch in range(2):
        whole, masked = encoder.encode(guide, BATCH, texts, [mask], CPU)
        assert calls.take() == [*([BATCH[:3]] if epoch == 0 else []), BATCH]
        assert torch.allclose(whole.sentence, expected.sentence, atol=1e-5)
        assert torch.equal(whole.token_ids, expected.token_ids)
        assert torch.equal(whole.word_ids, expected.word_ids)
        assert torch.equal(masked.tokens, expected_masked.tokens)
        words = expected.attention_mask
        if tokens:
            assert torch.allclose(whole.tokens[words], expected.tokens[words], atol=1e-5)
        else:
            assert whole.tokens.shape == (4, 0, guide.token_dim)


def test_features_of_a_caption_do_not_depend_on_when_it_was_encoded(guide):
    """Else a resumed run, which has forgotten them, would differ."""
    alone = CaptionEncoder(tokens=False, megabytes=1)
    alone.encode(guide, BATCH[:1], guide.tokenize(BATCH[:1]), [], CPU)
    fresh = CaptionEncoder(tokens=False, megabytes=1)
    texts = guide.tokenize(BATCH)
    one, other = (each.encode(guide, BATCH, texts, [], CPU)[0] for each in (alone, fresh))
    assert torch.equal(one.sentence, other.sentence)


@pytest.mark.slow
def test_memory_for_features_is_bounded(guide, monkeypatch):
    captions = [f"circle {number}" for number in range(5000)]  # 256 bytes each, room for 4,096
    encoder = CaptionEncoder(tokens=False, megabytes=1)
    encoder.encode(guide, BATCH[2:3], guide.tokenize(BATCH[2:3]), [], CPU)
    features = guide.encode(BATCH[:1])
    sentence, tokens = features.sentence.expand(5000, -1), features.tokens.expand(5000, -1, -1)
    encoder._keep(captions, replace(features, sentence=sentence, tokens=tokens))
    calls = Calls(guide, monkeypatch)
    encoder.encode(guide, captions, guide.tokenize(captions), [], CPU)
    assert [text for call in calls.take() for text in call] == captions[4095:]


def test_without_room_all_is_encoded_in_one_call(guide, monkeypatch):
    texts = guide.tokenize(BATCH)
    mask = texts.word_ids == 1
    calls = Calls(guide, monkeypatch)
    encoder = CaptionEncoder(tokens=False, megabytes=0)
    for _ in range(2):
        whole, masked = encoder.encode(guide, BATCH, texts, [mask], CPU)
        assert calls.take() == [BATCH * 2]
    assert torch.equal(whole.tokens, masked.tokens) is False
    assert len(whole.sentence) == len(masked.sentence) == 4


def test_copies_and_files_hold_no_features(guide):
    encoder = CaptionEncoder(tokens=True, megabytes=1)
    encoder.encode(guide, BATCH, guide.tokenize(BATCH), [], CPU)
    assert copy.deepcopy(encoder) is encoder
    assert len(pickle.dumps(encoder)) < 2000


@pytest.mark.parametrize(("tokens", "lookups"), [(False, 1), (True, 2)])
def test_features_from_disk_are_read_once_if_no_objective_reads_tokens(
    guide, monkeypatch, tmp_path, tokens, lookups
):
    block = {"use": "micro_clip"}
    _, steps = CachedGuide.write(tmp_path, guide, BATCH, block=block, precision="float32")
    list(steps)
    cached, expected, found = CachedGuide(str(tmp_path)), guide.encode(BATCH), []
    texts, find = cached.tokenize(BATCH), cached._shards.find
    monkeypatch.setattr(cached._shards, "find", lambda given: found.append(1) or find(given))
    encoder = CaptionEncoder(tokens=tokens, megabytes=1)
    for _ in range(2):
        cached._last = None
        (features,) = encoder.encode(cached, BATCH, texts, [], CPU)
        assert torch.allclose(features.sentence, expected.sentence, atol=1e-5)
    assert len(found) == lookups


def test_a_caption_that_the_cache_lacks_changes_no_later_batch(guide, tmp_path):
    """Its batch goes to the live encoder, whose features are not those on disk."""
    block = {"use": "micro_clip"}
    _, steps = CachedGuide.write(tmp_path, guide, ["a red circle", "two stars"], block=block)
    list(steps)
    cached = CachedGuide(str(tmp_path), missing="encode")
    last, whole, resumed = (
        ["a red circle", "a cat"],
        *(CaptionEncoder(tokens=False, megabytes=1) for _ in range(2)),
    )
    encode = [(whole, ["a red circle", "two stars"]), (whole, last), (resumed, last)]
    features = [e.encode(cached, t, cached.tokenize(t), [], CPU)[0].sentence for e, t in encode]
    assert torch.equal(features[1], features[2])


@pytest.mark.parametrize("source", ["micro_clip", "cached"])
def test_a_batch_without_images_encodes_nothing(guide, tmp_path, source):
    if source == "cached":
        _, steps = CachedGuide.write(tmp_path, guide, BATCH, block={"use": "micro_clip"})
        list(steps)
        guide = CachedGuide(str(tmp_path))
    encoder = CaptionEncoder(tokens=False, megabytes=1)
    (features,) = encoder.encode(guide, [], guide.tokenize([]), [], CPU)
    assert features.sentence.shape == (0, guide.sentence_dim)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_heads_compute_the_same_under_the_same_names(guide):
    objectives = {"masked_text": {"weight": 0.05}}
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 16, 32, generator=generator)
    found = []
    for is_compiled in (False, True):
        config = parse({"objectives": objectives, "compile": is_compiled, "every": 1})
        heads = Alignment(config, guide, code_dim=32)
        codes = Codes(vectors.clone().requires_grad_(), None, (4, 4))
        total, _ = heads(codes, BATCH, step=0)
        total.backward()
        gradients = {name: p.grad for name, p in heads.named_parameters() if p.grad is not None}
        found.append({"total": total.detach(), "codes": codes.codes.grad, **gradients})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, rtol=1e-3, atol=1e-6), name
