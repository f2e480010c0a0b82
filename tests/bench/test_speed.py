"""`lgvq bench`: ratios of a training step with and without LG-VQ."""

import dataclasses
import json

import pytest
import torch

from lgvq_plugin import cli
from lgvq_plugin.alignment import Alignment
from lgvq_plugin.bench import timing
from lgvq_plugin.bench.speed import CASES, parts_table, table


@pytest.fixture
def small():
    """The VQ-VAE's case with a tiny host."""
    case = next(case for case in CASES if case.name == "vqvae")
    params = {"embed_dim": 8, "channels": 8, "n_embed": 16}
    return dataclasses.replace(case, batch_sizes={"cpu": 2}, size=16, params=params)


@pytest.mark.slow
def test_a_case_is_measured_in_turns(small):
    rounds = []
    result = timing.measure(
        small, device=torch.device("cpu"), rounds=2, steps=1, progress=lambda: rounds.append(1)
    )
    shown = result.to_dict()
    assert len(rounds) == len(result.ratios) == 2
    expected = [a / b for a, b in zip(result.lgvq, result.bare, strict=True)]
    assert result.ratios == expected
    assert min(expected) <= shown["ratio"] <= max(expected)
    assert {"text encoder", "code-ViT", "masked_text", "backward"} <= set(result.parts)
    assert json.loads(json.dumps(shown))["case"] == "vqvae"
    lines = table([shown]).splitlines()
    assert lines[1].split()[:2] == ["vqvae", "2"]
    assert parts_table([shown]).splitlines()[0].split()[-1] == "vqvae"


@pytest.mark.slow
@pytest.mark.parametrize(("every", "turns"), [(1, 1), (3, 1), (3, 2)])
def test_a_turn_has_its_share_of_aligned_steps(small, monkeypatch, every, turns):
    """As many as in training, whatever --steps is."""
    case = dataclasses.replace(small, lgvq={**small.lgvq, "every": every})
    aligned, forward = [], Alignment._weighted_sum
    monkeypatch.setattr(
        Alignment, "_weighted_sum", lambda self, *a: aligned.append(1) or forward(self, *a)
    )
    monkeypatch.setattr(timing, "_parts", lambda *given: {})
    steps = every * turns - (every > 1)
    result = timing.measure(case, device=torch.device("cpu"), rounds=2, steps=steps)
    assert result.to_dict()["every"] == every
    assert len(aligned) == 2 + 2 * turns  # two to warm up


@pytest.mark.slow
@pytest.mark.parametrize(("new_captions", "calls"), [(False, 1), (True, 3)])
def test_captions_of_a_first_epoch_are_encoded_in_each_step(
    small, monkeypatch, new_captions, calls
):
    host = timing._host(small, {"use": "micro_clip"})
    step = timing.Step(host, torch.device("cpu"), new_captions=new_captions)
    heads, encoded = host.loss.alignment, []
    apart = heads.guide.encode_apart
    monkeypatch.setattr(
        heads.guide, "encode_apart", lambda texts: encoded.append(texts) or apart(texts)
    )
    batch = {"image": torch.rand(2, 16, 16, 3), "caption": ["a red circle", "two blue stars"]}
    for _ in range(3):
        heads.batches = 0  # what follows is aligned
        step(batch)
    assert encoded == [batch["caption"]] * calls


@pytest.mark.slow
def test_the_bare_host_has_no_heads_and_the_other_one_has(small):
    bare = timing._host(small, None)
    guided = timing._host(small, {"use": "micro_clip"})
    assert not any("lgvq" in name for name in bare.state_dict())
    assert set(guided.loss.alignment.objectives) == {
        *("global_semantic", "masked_text", "relationship")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_host_of_each_case_can_be_built(case):
    with torch.device("meta"):
        assert [*timing._host(case, None).parameters()]


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch):
    def measure(case, **options):
        if case.name == "vqgan-256":
            raise torch.cuda.OutOfMemoryError("out of memory")
        result = [0.2], [0.1], [0.2], {"host": 0.1}, {}
        return timing.Result(case, 2, *result)

    monkeypatch.setattr(timing, "measure", measure)
    out = str(tmp_path / "a.json")
    assert cli.main(["bench", "vqvae", "vqgan-256", "--no-progress", "--json", out]) == 1
    kept = json.loads((tmp_path / "a.json").read_text())
    assert [case["case"] for case in kept["cases"]] == ["vqvae"]
    assert kept["machine"]["cores"] >= 1


def test_time_in_an_inner_part_does_not_count_for_the_outer(monkeypatch):
    parts, clock = timing.Parts(torch.device("cpu")), iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(parts, "_now", lambda: next(clock))
    with parts("outer"), parts("inner"):
        pass
    assert parts.seconds == {"inner": 3.0, "outer": 3.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vqgn"], "no case 'vqgn'; did you mean 'vqgan'"),
        (["--rounds", "0"], "--rounds must be a whole number >= 1, got 0"),
    ],
)
def test_wrong_input(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_dtype_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "vqvae", "--dtype", "float99"])
    assert "invalid choice: 'float99'" in capsys.readouterr().err
