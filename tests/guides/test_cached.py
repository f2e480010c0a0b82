"""A text cache gives the guide's bits, refuses what is not its own, and survives a kill."""

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save

from lgvq_plugin.alignment import Alignment
from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.guides.cached import CachedGuide
from lgvq_plugin.guides.shards import CacheFacts, Packing, Shards, caption_key
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.types import Codes

HERE = Path(__file__).parent
TOY = {"use": "toy_guide.ToyGuide"}
MICRO = {"use": "micro_clip"}
CAPTIONS = ["a red circle above a blue square", "circle", "a dog  runs", "é 🙂"]
LONG = " ".join(["word"] * 50)
NAMES = ("token_ids", "attention_mask", "word_ids", "tokens", "sentence", "vocabulary")


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def fill(folder, block, captions, **options):
    """Write a cache to the end; return its guide."""
    guide = build_guide(block)
    options.setdefault("precision", "float32")
    _, steps = CachedGuide.write(folder, guide, captions, block=block, **options)
    list(steps)
    return guide


def assert_same(a, b):
    length = min(a.token_ids.shape[1], b.token_ids.shape[1])  # one may be trimmed
    assert not any(x.attention_mask[:, length:].any() for x in (a, b))
    for name in NAMES:
        one, other = getattr(a, name), getattr(b, name)
        if name in ("token_ids", "attention_mask", "word_ids", "tokens"):
            one, other = one[:, :length], other[:, :length]
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def maskings(folder, captions):
    """Return the stored maskings, (B, M, T)."""
    places = Shards(folder, CacheFacts.read(folder)).find(captions)
    return torch.stack([torch.from_numpy(shard["masks"][row].copy()) for shard, row in places])


@pytest.mark.slow
@pytest.mark.parametrize("block", [MICRO, TOY], ids=["micro_clip", "toy"])
@pytest.mark.parametrize("padding", [True, False])
def test_features_are_the_guides_bit_identical(tmp_path, block, padding):
    captions = ["", *CAPTIONS, LONG]
    guide = fill(tmp_path / "c", block, captions, maskings=3, padding=padding)
    cached = build_guide({"use": "cached", "folder": str(tmp_path / "c"), "guide": block})
    masks = maskings(tmp_path / "c", captions)
    assert masks[1:].any(dim=2).all()  # a word of each is hidden
    for mask in (None, *masks.unbind(dim=1)):
        theirs, ours = (g.encode(captions, token_mask=mask) for g in (guide, cached))
        if not padding:
            real = theirs.attention_mask[..., None]
            assert not ours.tokens.masked_select(~real).any()
            theirs = type(theirs)(**{**vars(theirs), "tokens": theirs.tokens.where(real, 0.0)})
        assert_same(ours, theirs)
    assert cached.max_length == guide.max_length
    assert cached.fingerprint == guide.fingerprint
    assert torch.equal(cached.tokenize(captions).word_ids, guide.tokenize(captions).word_ids)


@pytest.mark.slow
def test_a_cut_caption_counts_once_as_in_the_guide(tmp_path):
    """A step asks for the tokens, the whole captions, and the masked ones."""
    batch = [CAPTIONS[0], LONG]
    guide = fill(tmp_path, MICRO, batch)
    cached, counts = build_guide({"use": "cached", "folder": str(tmp_path)}), []
    for each in (guide, cached):
        for _ in range(2):
            for captions in (batch, CAPTIONS[:1]):  # another batch between two steps
                words = each.tokenize(captions).word_ids
                assert each.tokenize(captions).cut == (LONG in captions)
                generator = torch.Generator().manual_seed(0)
                mask = each.draw_mask(captions, words, ratio=(0.15, 0.5), generator=generator)
                each.encode(captions) if each is guide else each.encode(captions, token_mask=mask)
        counts.append(each.truncated)
    assert counts == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("block", [MICRO, TOY], ids=["micro_clip", "toy"])
def test_a_caption_that_the_guide_has_just_seen_is_stored_as_cut(tmp_path, block):
    guide = fill(tmp_path, block, CAPTIONS[:1])
    guide.tokenize([LONG])
    _, steps = CachedGuide.write(tmp_path, guide, [LONG], block=block)
    list(steps)
    assert build_guide({"use": "cached", "folder": str(tmp_path)}).tokenize([LONG]).cut == 1


def test_a_folder_of_other_files_is_refused_whatever_their_names(tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds no text cache"):
        fill(tmp_path, TOY, CAPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.slow
def test_order_and_repeats_change_no_bit(tmp_path):
    fill(tmp_path / "c", MICRO, [*CAPTIONS[:3]] * 2)
    cached = build_guide({"use": "cached", "folder": str(tmp_path / "c")})
    assert len(cached) == 4  # and ""
    one = cached.encode(CAPTIONS[:3])
    other = cached.encode([CAPTIONS[2], CAPTIONS[0], CAPTIONS[2]])
    assert torch.equal(other.tokens, one.tokens[[2, 0, 2]])
    assert torch.equal(other.sentence, one.sentence[[2, 0, 2]])


def test_features_lie_in_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("lgvq_plugin.guides.cached.SHARD_BYTES", 1)
    captions = [f"caption number {i}" for i in range(23)]
    guide = fill(tmp_path / "c", TOY, captions, batch_size=4)
    assert len(list((tmp_path / "c").glob("shard-*"))) == 6
    cached = CachedGuide(str(tmp_path / "c"))
    assert_same(cached.encode(captions[::-1]), guide.encode(captions[::-1]))


def test_maskings_differ_keep_the_ratio_and_come_from_the_generator(tmp_path):
    captions = [" ".join(f"w{i}{j}" for j in range(10)) for i in range(20)]
    block = {**TOY, "max_length": 12}
    fill(tmp_path / "c", block, captions, maskings=6, ratio=(0.2, 0.5))
    cached = CachedGuide(str(tmp_path / "c"))
    words = cached.tokenize(captions).word_ids

    def draw(seed, ratio=(0.2, 0.5)):
        generator = torch.Generator().manual_seed(seed)
        return cached.draw_mask(captions, words, ratio=ratio, generator=generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    hidden = draw(0).sum(dim=1)
    assert ((hidden >= 2) & (hidden <= 5)).all()
    assert not draw(0)[words < 0].any()
    kinds = {tuple(draw(seed)[0].tolist()) for seed in range(60)}
    assert 4 <= len(kinds) <= 6
    with pytest.raises(
        ConfigError, match=r"ratio \(0\.1, 0\.3\).*6 maskings of ratio \(0\.2, 0\.5"
    ):
        draw(0, ratio=(0.1, 0.3))


def test_a_short_caption_stores_its_only_masking_once(tmp_path):
    fill(tmp_path / "c", TOY, ["dog"], maskings=5)
    facts = CacheFacts.read(tmp_path / "c")
    shard = Shards(tmp_path / "c", facts).shards[0]
    # "" and "dog", unmasked, and the one masking of "dog"; all with their padding.
    assert len(shard["rows"]) == 3 * 8


def test_all_objectives_train_without_a_text_tower(tmp_path):
    block = {"objectives": {"masked_text": {"weight": 1, "ratio": [0.2, 0.4]}}, "guide": TOY}
    fill(tmp_path / "c", TOY, CAPTIONS[:3], ratio=(0.2, 0.4))
    cached = CachedGuide(str(tmp_path / "c"), guide=TOY)
    cached._loaded = lambda: pytest.fail("it built the guide")
    heads = Alignment(parse(block), cached, code_dim=5, grid=(2, 2))
    codes = Codes(torch.randn(4, 4, 5, requires_grad=True), None, (2, 2))
    loss, log = heads(codes, [*CAPTIONS[:3], None], step=3)
    loss.backward()
    assert codes.codes.grad.abs().sum() > 0
    assert log["train/lgvq/masked_text"] > 0


def test_terms_on_whole_captions_are_those_of_the_guide(tmp_path):
    guide = fill(tmp_path / "c", TOY, CAPTIONS[:3])
    block = {"objectives": {"masked_text": {"weight": 0}}}
    codes = Codes(torch.randn(3, 4, 5), None, (2, 2))
    both = [
        Alignment(parse(block), g, code_dim=5, grid=(2, 2))(codes, CAPTIONS[:3])[1]
        for g in (guide, CachedGuide(str(tmp_path / "c")))
    ]
    for name in ("global_semantic", "relationship"):
        assert torch.equal(both[0][f"train/lgvq/{name}"], both[1][f"train/lgvq/{name}"])


@pytest.mark.slow
def test_no_text_tower_stays_in_memory(tmp_path):
    from open_clip.transformer import TextTransformer

    def towers():
        gc.collect()
        return sum(type(thing) is TextTransformer for thing in gc.get_objects())

    before = towers()
    fill(tmp_path / "c", MICRO, CAPTIONS[:2])
    cached = build_guide({"use": "cached", "folder": str(tmp_path / "c"), "guide": MICRO})
    cached.encode(CAPTIONS[:2])
    assert towers() == before


# What is refused


def test_another_guides_cache_is_refused(tmp_path):
    fill(tmp_path / "c", TOY, CAPTIONS)
    other = {**TOY, "seed": 1}
    with pytest.raises(ConfigError, match="made by another guide or other weights"):
        CachedGuide(str(tmp_path / "c"), guide=other)
    with pytest.raises(ConfigError, match="made by another guide"):
        CachedGuide(str(tmp_path / "c"), guide=other, verify=False)
    with pytest.raises(ConfigError, match="was made with fingerprint"):
        fill(tmp_path / "c", other, CAPTIONS)
    with pytest.raises(ConfigError, match="was made with maskings: 4 then, 2 now"):
        fill(tmp_path / "c", TOY, CAPTIONS, maskings=2)


def test_a_stale_cache_is_refused(tmp_path, monkeypatch):
    import toy_guide

    fill(tmp_path / "c", TOY, CAPTIONS)
    plain = toy_guide.ToyGuide.vocabulary.fget
    monkeypatch.setattr(toy_guide.ToyGuide, "vocabulary", property(lambda self: plain(self) + 1e-3))
    with pytest.raises(ConfigError, match="other weights"):
        CachedGuide(str(tmp_path / "c"))
    assert len(CachedGuide(str(tmp_path / "c"), verify=False)) == 5


def test_an_overlay_over_another_block_leaves_its_keys(tmp_path):
    block = {**TOY, "width": 4}
    fill(tmp_path / "c", block, CAPTIONS)
    merged = {**block, "use": "cached", "folder": str(tmp_path / "c"), "guide": block}
    assert build_guide(merged).token_dim == 4
    with pytest.raises(ConfigError, match="no key 'foldr'"):
        build_guide({"use": "cached", "folder": str(tmp_path / "c"), "foldr": 3})


def test_what_is_not_there_is_reported(tmp_path):
    fill(tmp_path / "c", TOY, CAPTIONS[:2], maskings=0)
    cached = CachedGuide(str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"caption 'a cat' is not among the 3.*lgvq cache"):
        cached.encode(["a cat"])
    words = cached.tokenize(CAPTIONS[:2]).word_ids
    with pytest.raises(ConfigError, match=r"holds none; run `lgvq cache`"):
        cached.draw_mask(CAPTIONS[:2], words, ratio=(0.15, 0.5), generator=torch.Generator())
    with pytest.raises(ConfigError, match=r"holds no text cache.*lgvq cache"):
        CachedGuide(str(tmp_path / "nowhere"))


def test_a_mask_of_ones_own_is_reported(tmp_path):
    guide = fill(tmp_path / "c", TOY, CAPTIONS[:1], maskings=1)
    stored = maskings(tmp_path / "c", CAPTIONS[:1])[:, 0]
    other = (guide.tokenize(CAPTIONS[:1]).word_ids >= 0) & ~stored
    cached = CachedGuide(str(tmp_path / "c"))
    cached.encode(CAPTIONS[:1], token_mask=stored)
    with pytest.raises(ConfigError, match=r"this masking of caption 'a red.*draw_mask"):
        cached.encode(CAPTIONS[:1], token_mask=other)


def test_missing_captions_can_be_encoded(tmp_path, caplog):
    guide = fill(tmp_path / "c", TOY, CAPTIONS[:2])
    cached = CachedGuide(str(tmp_path / "c"), missing="encode")
    batch = [CAPTIONS[0], "a cat sleeps", LONG]
    mask = guide.tokenize(batch).word_ids == 1
    assert_same(cached.encode(batch), guide.encode(batch))
    assert_same(cached.encode(batch, token_mask=mask), guide.encode(batch, token_mask=mask))
    assert sum("the guide is loaded" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.0])
def test_a_broken_shard_is_named(tmp_path, keep):
    fill(tmp_path / "c", TOY, CAPTIONS)
    path = tmp_path / "c/shard-000000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ConfigError, match=r"shard-000000\.safetensors is broken"):
        CachedGuide(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_length": "many"}, "max_length: expected a whole number, got 'many'"),
        ({"ratio": None}, "ratio"),
        ({"token_dim": 0}, "token_dim: expected a whole number >= 1"),
        ({"token_dim": 7}, "vocabulary.safetensors|is broken"),
        ({"maskings": 9}, "masks: expected"),
        ({"guide": "micro_clip"}, "guide: expected a mapping"),
        (None, "not of format"),
    ],
)
def test_tampered_facts_are_named(tmp_path, changed, message):
    fill(tmp_path / "c", TOY, CAPTIONS)
    path = tmp_path / "c/cache.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | changed if changed else [1]))
    with pytest.raises(ConfigError, match=message):
        CachedGuide(str(tmp_path / "c"), verify=False)


@pytest.mark.parametrize("name", ["first", "token_ids", "keys", "attention", "sentence", "rows"])
def test_a_tampered_shard_is_named(tmp_path, name):
    fill(tmp_path / "c", TOY, CAPTIONS)
    path = tmp_path / "c/shard-000000.safetensors"
    arrays = load_file(path)
    broken = {"first": arrays["first"] + 10**6, "token_ids": arrays["token_ids"][:1]}
    path.write_bytes(save(arrays | {name: broken.get(name, arrays[name].astype("float64"))}))
    with pytest.raises(ConfigError, match=r"shard-000000\.safetensors is broken"):
        CachedGuide(str(tmp_path / "c"), verify=False)


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    fill(tmp_path / "c", TOY, CAPTIONS)
    path = tmp_path / "c/shard-000000.safetensors"
    arrays = load_file(path)
    path.write_bytes(save(arrays | {"token_ids": arrays["token_ids"] + 10**6}))
    with pytest.raises(ConfigError, match=r"not among the .* of its vocabulary"):
        CachedGuide(str(tmp_path / "c"), verify=False).tokenize(CAPTIONS)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no text cache"):
        fill(tmp_path, TOY, CAPTIONS)
    (tmp_path / "cache.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ConfigError, match="not of format"):
        CachedGuide(str(tmp_path))


# Processes


def _read(folder, captions, queue):
    cached = CachedGuide(str(folder), verify=False)
    sums = [float(cached.encode(captions).tokens.double().sum()) for _ in range(50)]
    queue.put(sums)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_many_processes_read_while_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("lgvq_plugin.guides.cached.SHARD_BYTES", 1)
    captions = [f"caption number {i}" for i in range(20)]
    guide = fill(tmp_path / "c", TOY, captions)
    expected = float(CachedGuide(str(tmp_path / "c")).encode(captions).tokens.double().sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    readers = [
        context.Process(target=_read, args=(tmp_path / "c", captions, queue)) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    more = [f"another caption {i}" for i in range(200)]
    _, steps = CachedGuide.write(tmp_path / "c", guide, more, block=TOY, batch_size=10)
    list(steps)
    message = [queue.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert all(value == expected for sums in message for value in sums)
    assert len(CachedGuide(str(tmp_path / "c"))) == 221


def test_any_string_has_a_key():
    keys = {caption_key(text) for text in ("", " ", "a", "é", "\udcff", "🙂", "\0")}
    assert len(keys) == 7
    assert {len(key) for key in keys} == {16}


def test_it_travels_by_pickle(tmp_path):
    fill(tmp_path / "c", TOY, CAPTIONS[:2])
    cached = CachedGuide(str(tmp_path / "c"), guide=TOY)
    twin = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 1000
    assert twin.config == cached.config
    assert_same(twin.encode(CAPTIONS[:2]), cached.encode(CAPTIONS[:2]))


SLOW = """
import sys, time
from pathlib import Path
from toy_guide import ToyGuide
from lgvq_plugin.guides import cached
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.guides.cached import CachedGuide

cached.SHARD_BYTES = 1
block = {"use": "toy_guide.ToyGuide"}
guide = build_guide(block)
plain = ToyGuide.encode
ToyGuide.encode = lambda *args, **more: (time.sleep(0.02), plain(*args, **more))[1]
captions = [f"caption number {i}" for i in range(60)]
options = {"block": block, "batch_size": 4, "precision": "float32"}
_, steps = CachedGuide.write(Path(sys.argv[1]), guide, captions, **options)
list(steps)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    run = subprocess.Popen([sys.executable, "-c", SLOW, folder], env=environment)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shard-*.safetensors"))) < 3 and time.monotonic() < deadline:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    captions = [f"caption number {i}" for i in range(60)]
    there = len(CachedGuide(str(folder)))
    assert 12 <= there < 61
    assert there % 4 == 0  # whole shards
    (folder / "shard-000099.safetensors.123.part").write_bytes(b"half")
    guide = build_guide(TOY)
    plan, steps = CachedGuide.write(folder, guide, captions, block=TOY, batch_size=4)
    assert plan.done == there
    assert sum(steps) == 61 - there
    cached = CachedGuide(str(folder))
    assert_same(cached.encode(captions), guide.encode(captions))
    assert not list(folder.glob("*.part"))
    # Maskings depend on seed and caption alone, so a kill changes none.
    fill(tmp_path / "d", TOY, captions)
    assert torch.equal(maskings(folder, captions), maskings(tmp_path / "d", captions))


def test_a_cache_of_an_earlier_version_still_loads():
    """Written before safetensors mapped the shards: two masks per caption, no padding."""
    block = {**TOY, "width": 2}
    guide, cached = build_guide(block), CachedGuide(str(HERE / "old_cache"), guide=block)
    captions = ["", CAPTIONS[0], "circle", "a dog  runs", LONG]
    assert len(cached) == len(captions)
    for mask in (None, *maskings(HERE / "old_cache", captions).unbind(dim=1)):
        wanted = guide.encode(captions, token_mask=mask)
        tokens = wanted.tokens.where(wanted.attention_mask[..., None], 0.0)
        assert_same(
            cached.encode(captions, token_mask=mask),
            type(wanted)(**{**vars(wanted), "tokens": tokens}),
        )
    assert cached.tokenize(captions).cut == guide.tokenize(captions).cut == 2


def test_token_features_are_mapped_and_not_read(tmp_path):
    fill(tmp_path / "c", TOY, CAPTIONS)
    shard = Shards(tmp_path / "c", CacheFacts.read(tmp_path / "c")).shards[0]
    assert not shard["rows"].flags.owndata


# Precision


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "token", "sentence"), [("int8", 1e-2, 1e-2), ("int4", 0.12, 1e-2)]
)
def test_rounded_features_are_near_and_cover_the_real_tokens(tmp_path, precision, token, sentence):
    captions = ["", *CAPTIONS, LONG]
    guide = fill(tmp_path / "c", MICRO, captions, maskings=2, precision=precision)
    cached = CachedGuide(str(tmp_path / "c"))
    for mask in (None, *maskings(tmp_path / "c", captions).unbind(dim=1)):
        theirs, ours = (g.encode(captions, token_mask=mask) for g in (guide, cached))
        for name in ("token_ids", "attention_mask", "word_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        real = theirs.attention_mask
        assert not ours.tokens[~real].any()
        for one, other, bound in (
            (ours.tokens[real], theirs.tokens[real], token),
            (ours.sentence, theirs.sentence, sentence),
            (ours.vocabulary, theirs.vocabulary, sentence),
        ):
            assert (one - other).norm() < bound * other.norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 31, 32, 100])
def test_packing_errs_by_half_a_step_at_most(bits, width):
    vectors = torch.randn(50, width, generator=torch.Generator().manual_seed(width)).numpy()
    vectors[0], vectors[1, 1:] = 0.0, 0.0
    packing = Packing(width, bits)
    packed = packing.pack(vectors)
    assert packed.nbytes == 50 * packing.bytes
    step = abs(vectors).max(axis=1, keepdims=True) / 2 ** (bits - 1)
    # The opposite end of the range has one step less.
    assert (abs(packing.unpack(packed) - vectors) <= 1.01 * step).all()
    assert not packing.unpack(packed)[0].any()
    assert packing.unpack(packing.pack(vectors[:0])).shape == (0, width)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_features_that_cannot_be_rounded_are_refused(value):
    vectors = torch.zeros(1, 40)
    vectors[0, 35] = value
    with pytest.raises(ConfigError, match="use precision float32"):
        Packing(40, 4).pack(vectors.numpy())


def test_a_cache_keeps_its_precision_when_captions_are_added(tmp_path):
    for precision in ("int4", "float32"):
        folder = tmp_path / precision
        guide = fill(folder, TOY, CAPTIONS[:2], precision=precision)
        plan, steps = CachedGuide.write(folder, guide, CAPTIONS, block=TOY)
        assert sum(steps) == len(plan.todo) == 2
        assert CachedGuide(str(folder)).facts.precision == precision
    with pytest.raises(ConfigError, match="was made with precision: 'int4' then, 'int8' now"):
        fill(tmp_path / "int4", TOY, CAPTIONS, precision="int8")
    with pytest.raises(ConfigError, match="precision: expected one of"):
        fill(tmp_path / "new", TOY, CAPTIONS, precision="int5")


@pytest.mark.slow
def test_new_caches_take_a_small_part_of_the_exact_ones_disk(tmp_path):
    captions = [f"a red circle above {i} blue squares" for i in range(100)]
    sizes = {}
    for precision in ("int4", "float32"):
        fill(tmp_path / precision, MICRO, captions, precision=precision)
        sizes[precision] = sum(p.stat().st_size for p in (tmp_path / precision).glob("shard-*"))
    assert sizes["int4"] < 0.1 * sizes["float32"]
    assert sizes["int4"] / 101 < 5000


@pytest.mark.parametrize("recipe", ["paper", "corrected"])
def test_no_objective_depends_on_features_at_padding(tmp_path, recipe):
    losses = []
    for padding in (True, False):
        fill(tmp_path / str(padding), TOY, CAPTIONS, padding=padding)
        cached = CachedGuide(str(tmp_path / str(padding)))
        heads = Alignment(parse({"recipe": recipe, "guide": TOY}), cached, code_dim=5, grid=(2, 2))
        codes = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
        heads.eval()  # without dropout
        losses.append(heads(Codes(codes, None, (2, 2)), CAPTIONS)[0])
    assert torch.equal(*losses)


def test_captions_of_about_one_length_are_encoded_together(tmp_path, monkeypatch):
    import toy_guide

    captions = [" ".join(["word"] * (1 + i * 7 % 6)) + f" {i}" for i in range(40)]
    batches, plain = [], toy_guide.ToyGuide.encode

    def encode(self, texts, token_mask=None):
        batches.append([min(6, len(text.split())) for text in texts])
        return plain(self, texts, token_mask)

    monkeypatch.setattr(toy_guide.ToyGuide, "encode", encode)
    fill(tmp_path / "c", TOY, captions, batch_size=8, maskings=0)
    lengths = [length for batch in batches for length in batch]
    assert len(lengths) == 41
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("precision", ["int4", "float32"])
def test_features_are_cut_to_the_longest_caption(tmp_path, precision):
    fill(tmp_path / "c", TOY, CAPTIONS, precision=precision)
    cached = CachedGuide(str(tmp_path / "c"))
    batch = CAPTIONS[1:3]
    rows = [cached.encode([text]).padded(5, 0) for text in batch]
    cut = cached.encode(batch)
    assert cut.tokens.shape == (2, 5, 6)  # start, three words, end
    expected = torch.cat([row.tokens for row in rows])
    assert torch.equal(cut.tokens[cut.attention_mask], expected[cut.attention_mask])
    assert torch.equal(cut.attention_mask, torch.cat([row.attention_mask for row in rows]))
    mask = cached.draw_mask(
        batch, cut.word_ids, ratio=(0.15, 0.5), generator=torch.Generator().manual_seed(0)
    )
    assert mask.shape == (2, 5)
    assert cached.encode(batch, token_mask=mask).tokens.shape == cut.tokens.shape


def test_a_guide_that_cuts_its_batches_can_be_cached(tmp_path, monkeypatch):
    import toy_guide

    fill(tmp_path / "whole", TOY, CAPTIONS, padding=False)
    plain = toy_guide.ToyGuide.tokenize

    def tokenize(self, captions):
        text = plain(self, captions)
        length = int(text.attention_mask.sum(dim=1).max())
        parts = (text.token_ids, text.attention_mask, text.word_ids)
        return type(text)(*(part[:, :length] for part in parts), text.cut)

    def encode(self, captions, token_mask=None):
        text = tokenize(self, captions)
        size = text.token_ids.shape[1]
        whole = token_mask
        if token_mask is not None:
            whole = torch.nn.functional.pad(token_mask, (0, self.max_length - size))
        full = encode_whole(self, captions, whole)
        parts = (full.token_ids, full.attention_mask, full.word_ids, full.tokens)
        return type(full)(*(part[:, :size] for part in parts), full.sentence, full.vocabulary)

    def encode_whole(self, captions, token_mask):
        monkeypatch.setattr(toy_guide.ToyGuide, "tokenize", plain)
        features = plain_encode(self, captions, token_mask)
        monkeypatch.setattr(toy_guide.ToyGuide, "tokenize", tokenize)
        return features

    plain_encode = toy_guide.ToyGuide.encode
    monkeypatch.setattr(toy_guide.ToyGuide, "tokenize", tokenize)
    monkeypatch.setattr(toy_guide.ToyGuide, "encode", encode)
    fill(tmp_path / "cut", TOY, CAPTIONS, padding=False, batch_size=2)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(HERE)
    one, other = (CachedGuide(str(tmp_path / name)) for name in ("whole", "cut"))
    masks = maskings(tmp_path / "whole", CAPTIONS)[:, 0]
    for mask in (None, masks):
        assert_same(one.encode(CAPTIONS, token_mask=mask), other.encode(CAPTIONS, token_mask=mask))


@pytest.mark.slow
def test_the_dtype_of_the_text_encoder_is_compared_without_its_weights(tmp_path):
    block = {"use": "open_clip", "model": "ViT-S-32-alt", "pretrained": None}
    fill(tmp_path / "float", block, CAPTIONS[:2])
    fill(tmp_path / "bfloat", {**block, "dtype": "bfloat16"}, CAPTIONS[:2])
    for folder, dtype, fits in [
        ("float", "float32", True),
        ("float", "bfloat16", False),
        ("bfloat", "bfloat16", True),
        ("bfloat", None, False),
    ]:
        given = block | ({"dtype": dtype} if dtype else {})
        with (
            contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="another guide")
        ):
            CachedGuide(str(tmp_path / folder), guide=given, verify=False)
