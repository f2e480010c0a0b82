"""Files as old trainers wrote them, hostile ones, and broken ones."""

import argparse
import collections
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lgvq_plugin.checkpoints.load import load_checkpoint
from lgvq_plugin.checkpoints.read import named_globals, read_raw, stand_in
from lgvq_plugin.sockets import ConfigError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def saved(tmp_path, content, name="file.ckpt", **options):
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


def gone_class(monkeypatch, module, name):
    """A class that can be pickled now and not imported any more when the file is read."""
    made = types.ModuleType(module)
    cls = type(name, (), {"__module__": module})
    setattr(made, name, cls)
    monkeypatch.setitem(sys.modules, module, made)
    return cls


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


class Shell:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("hostile", [Hostile, Shell])
def test_a_malicious_file_is_refused_and_nothing_runs(tmp_path, hostile, old_format):
    mark = tmp_path / "it_ran"
    path = saved(
        tmp_path,
        {"state_dict": WEIGHTS, "callbacks": hostile(mark)},
        _use_new_zipfile_serialization=not old_format,
    )
    with pytest.raises(ConfigError, match=r"asks for (builtins\.exec|posix\.system).*--trust"):
        load_checkpoint(path)
    assert not mark.exists()
    load_checkpoint(path, trust_pickle=True)  # the test can fail: the file does run code
    assert mark.exists()


def test_a_malicious_file_hides_behind_no_allowed_name(tmp_path, monkeypatch):
    """An allowed class that is called, built and filled by the pickle stays inert."""
    mark = tmp_path / "it_ran"
    callback = gone_class(monkeypatch, "pytorch_lightning.callbacks.gone", "Gone")
    callback.__setstate__ = lambda self, state: mark.touch()
    callback.__getstate__ = lambda self: {"x": 1}
    path = saved(tmp_path, {"state_dict": WEIGHTS, "callbacks": {"gone": callback()}})
    assert read_raw(path)[1] == "allow_list"  # even while the class can be imported
    assert not mark.exists()


@pytest.mark.parametrize("old_format", [False, True])
def test_old_lightning_and_omegaconf_files(tmp_path, monkeypatch, old_format):
    from pytorch_lightning.callbacks import ModelCheckpoint

    gone = gone_class(monkeypatch, "pytorch_lightning.callbacks.old_place", "ModelCheckpoint")
    config = OmegaConf.create({"model": {"target": "m.C", "params": {"ch_mult": [1, 2], "n": 0.5}}})
    path = saved(
        tmp_path,
        {
            "state_dict": WEIGHTS,
            "global_step": 7,
            "callbacks": {
                ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best": np.float64(0.25)},
                gone: {"monitor": "val/rec_loss", "count": np.int64(-3), "flag": np.bool_(True)},
            },
            "hyper_parameters": config.model.params,
            "whole": config,
            "args": argparse.Namespace(lr=1e-4, data=pathlib.PosixPath("/data/x")),
            "optimizer_states": [{"state": collections.defaultdict(dict, {0: {"step": 3}})}],
            "half": np.float16(1.5),
        },
        _use_new_zipfile_serialization=not old_format,
    )
    monkeypatch.delitem(sys.modules, "pytorch_lightning.callbacks.old_place")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    raw, how = read_raw(path)
    assert how == "allow_list"
    assert raw["hyper_parameters"] == {"ch_mult": [1, 2], "n": 0.5}
    assert raw["whole"] == OmegaConf.to_container(config)
    assert raw["args"] == {"lr": 1e-4, "data": "/data/x"}
    assert raw["optimizer_states"] == [{"state": {0: {"step": 3}}}]
    old = raw["callbacks"]["pytorch_lightning.callbacks.old_place.ModelCheckpoint"]
    assert old == {"monitor": "val/rec_loss", "count": -3, "flag": True}
    assert raw["half"] == 1.5
    real = raw["callbacks"][f"{ModelCheckpoint.__module__}.ModelCheckpoint"]
    assert real["best"] == 0.25
    assert torch.equal(raw["state_dict"]["a.weight"], WEIGHTS["a.weight"])
    found = load_checkpoint(path)
    assert (found.step, found.how, found.root) == (7, "allow_list", "state_dict")


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # Python 3.13 has the latter
def test_a_path_of_any_python(tmp_path, monkeypatch, module):
    path_class = gone_class(monkeypatch, module, "PosixPath")
    path_class.__reduce__ = lambda self: (path_class, ("/", "data", "x"))
    path_class.__new__ = lambda cls, *parts: object.__new__(cls)
    path = saved(tmp_path, {"state_dict": WEIGHTS, "root": path_class()})
    monkeypatch.undo()
    raw, how = read_raw(path)
    assert (raw["root"], how) == ("/data/x", "allow_list")


@pytest.mark.parametrize(
    "value",
    [np.float64(-1.25e300), np.float32(0.1), np.int8(-7), np.uint64(2**64 - 1), np.bool_(False)],
)
def test_numpy_scalars_keep_their_value(tmp_path, value):
    raw, how = read_raw(saved(tmp_path, {"x": value}))
    assert how == "allow_list"
    assert raw["x"] == value


def test_numpy_objects_and_big_endian(tmp_path):
    swapped = np.array([1.5], dtype=">f4")[0]
    raw, _ = read_raw(saved(tmp_path, {"x": swapped, "y": np.dtype(">i2").type(5)}))
    assert raw["x"] == 1.5
    assert raw["y"] == 5


def test_no_stand_in_is_the_class_that_it_stands_for():
    for name in (
        "argparse.Namespace",
        "collections.defaultdict",
        "omegaconf.dictconfig.DictConfig",
    ):
        module, _, last = name.rpartition(".")
        __import__(module)
        made = stand_in(name)
        assert made is not None
        assert made is not getattr(sys.modules[module], last)
        assert f"{made.__module__}.{made.__qualname__}" == name


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "functools.partial",
        "pytorch_lightning.trainer.Trainer",
        "numpy.load",
        "omegaconf.omegaconf.OmegaConf",
        "mymain.SetupCallback",
        "argparse.ArgumentParser",
    ],
)
def test_other_names_have_no_stand_in(name):
    assert stand_in(name) is None


def test_names_in_a_file_are_told_without_loading(tmp_path):
    path = saved(tmp_path, {"x": Hostile(tmp_path / "ran")})
    assert {name.rpartition(".")[2] for name in named_globals(path)} == {"exec"}
    assert not (tmp_path / "ran").exists()


def test_nothing_stays_on_torchs_own_allow_list(tmp_path):
    before = {*torch.serialization.get_safe_globals()}
    read_raw(saved(tmp_path, {"x": argparse.Namespace(a=1)}))
    assert {*torch.serialization.get_safe_globals()} == before


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    found = load_checkpoint(tmp_path / "w.safetensors")
    assert found.how == "safetensors"
    assert torch.equal(found.state_dict["a.weight"], WEIGHTS["a.weight"])


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_broken_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no checkpoint at all")
    with pytest.raises(ConfigError, match=name):
        load_checkpoint(tmp_path / name)
    with pytest.raises(ConfigError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nothing.ckpt")


def test_a_cut_file_is_named(tmp_path):
    path = saved(tmp_path, {"state_dict": {"a": torch.zeros(10000)}})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"file\.ckpt"):
        load_checkpoint(path)


def test_a_whole_module_needs_trust(tmp_path):
    path = saved(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="--trust-pickle"):
        load_checkpoint(path)
    assert set(load_checkpoint(path, trust_pickle=True).state_dict) == {"weight", "bias"}


def test_tensors_that_were_saved_on_another_device_come_to_the_cpu(shared):
    """The real file was pickled on a GPU."""
    path = shared / "vqvae_cifar10_swasun" / "shuffled_model.pth"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert {value.device.type for value in load_checkpoint(path).state_dict.values()} == {"cpu"}
