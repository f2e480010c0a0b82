"""Configs as taming and latent-diffusion ship them, with `--data FOLDER` and `--max-steps N`."""

import json
import textwrap

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from lgvq_plugin.checkpoints.load import load_checkpoint
from lgvq_plugin.cli import main
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import with_shortcuts
from lgvq_plugin.training.config import Sections, read_config

EXTENDED = [pytest.mark.slow, pytest.mark.extended]
LOSS = "model.params.lossconfig.params"
OFFLINE = [f"{LOSS}.perceptual_weight=0", f"{LOSS}.lgvq.guide.use=micro_clip"]
TAMING = "taming.models.vqgan.VQModel"
LDM = "ldm_lookalike.models.autoencoder.VQModel"

SHIPPED = {  # name: (target, ch_mult, loss params, train target, its params, more of data)
    "custom_vqgan": (
        TAMING,
        [1, 1, 2],
        {"disc_start": 10000, "disc_weight": 0.8},
        ("taming.data.custom.CustomTrain", {"training_images_list_file": "some/x.txt"}),
        {"batch_size": 5, "num_workers": 40},
    ),
    "imagenet_vqgan": (
        TAMING,
        [1, 1, 2],
        {"disc_start": 250001, "disc_weight": 0.8},
        ("taming.data.imagenet.ImageNetTrain", {"config": {"size": 256}}),
        {"batch_size": 3, "num_workers": 8},
    ),
    "faceshq_vqgan": (
        TAMING,
        [1, 1, 2],
        {"disc_start": 30001, "disc_weight": 0.8},
        ("taming.data.faceshq.FacesHQTrain", {"size": 256, "crop_size": 256}),
        {"batch_size": 3, "num_workers": 8},
    ),
    "vq-f4": (
        LDM,
        [1, 2, 4],
        {"disc_start": 0, "disc_weight": 0.75},
        ("ldm.data.openimages.FullOpenImagesTrain", {"crop_size": 256}),
        {"batch_size": 8, "num_workers": 16, "wrap": True},
    ),
    "vq-f16": (
        LDM,
        [1, 1, 2, 4],
        {"disc_start": 1, "disc_weight": 0.6, "disc_num_layers": 2},
        ("ldm.data.openimages.FullOpenImagesTrain", {"size": 384, "crop_size": 256}),
        {"batch_size": 4, "num_workers": 20, "wrap": True},
    ),
}


def shipped(name, target=None, loss="lgvq_plugin.LGVQLoss"):
    host, ch_mult, disc, (train, params), data = SHIPPED[name]
    monitor = {"monitor": "val/rec_loss"} if host == LDM else {}
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": target or host,
            "params": {
                "embed_dim": 4,
                "n_embed": 32,
                **monitor,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": 4,
                    "resolution": 32,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": ch_mult,
                    "num_res_blocks": 1,
                    "attn_resolutions": [8],
                    "dropout": 0.0,
                },
                "lossconfig": {
                    "target": loss,
                    "params": {
                        "disc_conditional": False,
                        "disc_in_channels": 3,
                        "codebook_weight": 1.0,
                        **disc,
                    },
                },
            },
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                **data,
                "train": {"target": train, "params": params},
                "validation": {"target": train.replace("Train", "Test"), "params": params},
            },
        },
    }


@pytest.fixture
def photos(tmp_path):
    """A folder of forty pictures with a caption beside each."""
    return make_photos(tmp_path / "photos", 40)


def make_photos(folder, count, captions=True):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (48, 40), (6 * i % 255, 90, 200)).save(folder / f"{i:02d}.jpg")
        if captions:
            (folder / f"{i:02d}.txt").write_text("a red square and a dinosaur\n")
    return folder


@pytest.fixture
def ldm(tmp_path, monkeypatch):
    """latent-diffusion's VQModel over taming's parts, with the arguments that its configs use."""
    (tmp_path / "ldm_lookalike/models").mkdir(parents=True)
    source = """
        import torch
        from taming.models.vqgan import VQModel as Base

        class VQModel(Base):
            def __init__(self, ddconfig, lossconfig, n_embed, embed_dim, monitor=None, **more):
                super().__init__(ddconfig, lossconfig, n_embed, embed_dim, monitor=monitor, **more)
                self.lr_g_factor = 1.0

            def forward(self, input, return_pred_indices=False):
                quant, diff, (_, _, indices) = self.encode(input)
                made = self.decode(quant)
                return (made, diff, indices) if return_pred_indices else (made, diff)
    """
    (tmp_path / "ldm_lookalike/models/autoencoder.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def run(tmp_path, capsys, caplog, monkeypatch, ldm):
    """A function that writes a config and runs a command on it: (exit code, what it said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(config, *words, command="train"):
        OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
        caplog.clear()
        name = ["--name", "a", "--no-progress"] if command == "train" else []
        code = main([command, "-b", "config.yaml", *map(str, words), *name])
        return code, capsys.readouterr().err + caplog.text

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vq-f4",
        pytest.param("custom_vqgan", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=EXTENDED)
            for name in ("imagenet_vqgan", "faceshq_vqgan", "vq-f16")
        ),
    ],
)
def test_a_shipped_config_trains_with_data_and_steps(run, photos, tmp_path, name):
    config = shipped(name)
    workers = [] if name == "custom_vqgan" else ["data.num_workers=0"]
    code, said = run(config, "--data", photos, "--max-steps", 1, *OFFLINE, *workers)
    assert code == 0, said
    merged = OmegaConf.load(tmp_path / "logs/a/configs/merged.yaml")
    assert merged.training == {"max_steps": 1}
    assert merged.data.batch_size == config["data"]["params"]["batch_size"]
    assert merged.data.train.params == {
        "root": str(photos),
        "split": "train",
        "size": 32,
        "crop": "random",
    }
    assert merged.data.validation.params == {
        "root": str(photos),
        "split": "validation",
        "size": 32,
    }
    assert "training images have captions" in said
    rate = config["data"]["params"]["batch_size"] * 4.5e-6
    assert f"learning rate {rate:.3g} =" in said
    metrics = (tmp_path / "logs/a/metrics.csv").read_text().splitlines()[0]
    assert "train/lgvq/relationship" in metrics
    assert "val/lgvq/relationship" in metrics


def test_what_is_missing_is_said_at_once(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.models.vgg16", unreachable)
    config = shipped("custom_vqgan")
    config["model"]["params"]["lossconfig"]["params"]["lgvq"] = {
        "guide": {"cache_dir": str(tmp_path / "hub")}
    }
    monkeypatch.setattr("lgvq_plugin.hub.urllib.request.urlopen", unreachable)
    code, said = run(config)
    assert code == 2, said
    for part in (
        "--max-steps N",
        "--data FOLDER (images with captions)",
        "taming.data.custom",
        "vgg16-397923af.pth",
        "perceptual_weight: 0",
        "guide: {use: open_clip, pretrained: PATH}",
        "not for photographs",
    ):
        assert part in said, part
    assert said.count("lgvq: error:") == 1
    assert not (tmp_path / "logs").exists()


def unreachable(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.slow
def test_a_data_set_without_captions_is_among_what_is_missing(run, tmp_path):
    config = shipped("custom_vqgan")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "class CustomTrain:\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i):\n"
        "        return {'image': np.zeros((32, 32, 3), np.float32), 'file_path_': 'x'}\n"
    )
    config["data"]["params"]["train"] = {"target": "mine.CustomTrain"}
    del config["data"]["params"]["validation"]
    code, said = run(config, *OFFLINE)
    assert code == 2
    assert "--max-steps N" in said
    assert "its samples have no captions" in said
    code, said = run(config, "--max-steps", 1, "data.num_workers=0", *OFFLINE)
    assert code == 2
    assert "a batch with no captions" in said
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "validation"), ("train",)])
def test_split_folders_are_used(tmp_path, splits):
    for split in splits:
        make_photos(tmp_path / "photos" / split, 30 if split == "train" else 3)
    config = with_shortcuts(OmegaConf.create(shipped("vq-f4")), data=tmp_path / "photos")
    data = config.data
    held_out = data.validation.params
    if len(splits) > 1:
        assert (data.train.params.split, held_out.split) == ("train", "validation")
        assert data.train.params.root == held_out.root == str(tmp_path / "photos")
    else:
        assert data.train.params.root == held_out.root == str(tmp_path / "photos/train")
        assert (data.train.params.split, held_out.split) == ("train", "validation")
    assert ("test" in data) == ("test" in splits)
    assert data.batch_size == 8


def test_data_resolves_what_referred_to_the_old_section(photos):
    config = OmegaConf.create(shipped("custom_vqgan"))
    config.data.params.train.params.size = 16
    config.model.params.ddconfig.resolution = "${data.params.train.params.size}"
    made = with_shortcuts(config, data=photos)
    assert made.model.params.ddconfig.resolution == 16


def test_overrides_about_data_apply_to_the_folder(tmp_path):
    folder = make_photos(tmp_path / "photos", 20)
    words = ["data.train.params.encoding=latin-1", "data.train.params.size=32"]
    words += ["data.validation.params.size=${data.train.params.size}", "data.batch_size=3"]
    config = read_config([], [*words, "data.train.target=folder"])
    made = with_shortcuts(config, data=folder, overrides=words)
    assert made.data.batch_size == 3
    for section in (made.data.train, made.data.validation):
        assert (section.params.encoding, section.params.size) == ("latin-1", 32)
    assert (made.data.train.params.crop, made.data.validation.params.get("crop")) == (
        "random",
        None,
    )


def test_helper_keys_of_the_root_are_not_reported_as_unread(photos, caplog):
    config = OmegaConf.create({**shipped("custom_vqgan"), "width": 32, "unused": 1})
    config.model.params.ddconfig.ch = "${width}"
    Sections.from_config(with_shortcuts(config, data=photos, max_steps=1)).warn()
    assert "unused: not read" in caplog.text
    assert "width" not in caplog.text


def test_few_images_train_without_validation(tmp_path, caplog):
    folder = make_photos(tmp_path / "few", 2)
    config = with_shortcuts(OmegaConf.create(shipped("vq-f4")), data=folder)
    assert "validation" not in config.data
    assert "no validation" in caplog.text


def test_a_folder_that_is_not_there_is_named(run):
    code, said = run(shipped("vq-f4"), "--data", "nowhere", "--max-steps", 1)
    assert code == 2
    assert "nowhere does not exist" in said


def test_size_is_the_hosts_resolution(photos, caplog):
    data = {"batch_size": 2, "train": {"target": "folder", "params": {"root": str(photos)}}}
    config = {**shipped("custom_vqgan"), "data": data, "training": {"max_steps": 1}}
    sections = Sections.from_config(config)
    assert sections.data.train["params"]["size"] == 32
    assert sections.plain["data"]["train"]["params"]["size"] == 32
    assert not sections.warnings
    data["train"]["params"]["size"] = 16
    sections = Sections.from_config(config)
    assert sections.data.train["params"]["size"] == 16
    (warning,) = sections.warnings
    assert "size 16" in warning
    assert "32 (model.params.ddconfig.resolution)" in warning


@pytest.mark.slow
def test_validation_on_training_images_is_warned_of(run, photos):
    part = {"target": "folder", "params": {"root": str(photos)}}
    config = {**shipped("custom_vqgan"), "data": {"batch_size": 2, "train": part}}
    config["data"]["validation"] = {**part, "params": {**part["params"], "split": "validation"}}
    config["training"] = {"max_steps": 1, "val_batches": 1}
    code, said = run(config, *OFFLINE)
    assert code == 0
    assert "of its" in said
    assert "images are training images" in said
    assert "the guide does not know" in said
    assert "dinosaur" in said


@pytest.mark.slow
def test_scenes_say_nothing_of_the_kind(run):
    part = {"target": "scenes", "params": {"length": 40}}
    config = {**shipped("custom_vqgan"), "data": {"batch_size": 2, "train": part}}
    config["data"]["validation"] = {
        **part,
        "params": {"length": 4, "split": "validation", "size": 32},
    }
    config["training"] = {"max_steps": 1, "val_every": None, "images_every": None}
    code, said = run(config, *OFFLINE)
    assert code == 0
    assert "40 of 40 training images have captions" in said
    assert "training images, so" not in said
    assert "does not know" not in said


@pytest.mark.slow
def test_a_list_of_paths_alone_is_refused(run, tmp_path):
    folder = make_photos(tmp_path / "bare", 6, captions=False)
    names = "".join(f"{path}\n" for path in sorted(folder.glob("*.jpg")))
    (tmp_path / "train.txt").write_text(names)
    part = {"target": "list_file", "params": {"root": str(tmp_path / "train.txt")}}
    config = {**shipped("custom_vqgan"), "data": {"batch_size": 2, "train": part}}
    code, said = run(config, "--max-steps", 2, *OFFLINE)
    assert code == 2
    assert "none of its 6 images has a caption" in said
    assert "path<TAB>caption" in said
    assert not (tmp_path / "logs").exists()
    first = names.splitlines()[0]
    (tmp_path / "train.txt").write_text(names.replace(first, f"{first}\ta red square"))
    code, said = run(config, "--max-steps", 1, *OFFLINE)
    assert code == 0
    assert "1 of 6 training images have captions" in said


DDCONFIG = "model.params.ddconfig"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{DDCONFIG}.in_channels=1"], ["data gives 3 × 32 × 32", "this host takes 1 channel"]),
        pytest.param(
            *([f"{DDCONFIG}.in_channels=7"], ["this host takes 7 channels"]), marks=EXTENDED
        ),
        ([f"{DDCONFIG}.out_ch=4"], ["its decoder gives 4 channels", "out_ch: 3"]),
        pytest.param(
            *([f"{DDCONFIG}.out_ch=1"], ["its decoder gives 1 channel", "out_ch: 3"]),
            marks=EXTENDED,
        ),
        ([f"{LOSS}.disc_in_channels=1"], ["its discriminator takes 1 channel"]),
        pytest.param(
            *(["data.train.params.size=34"], ["data gives 3 × 34 × 34", "multiples of 4"]),
            marks=EXTENDED,
        ),
        (
            ["data.train.params.size=34", f"{DDCONFIG}.in_channels=1"],
            ["data gives 3 × 34 × 34", "this host takes 1 channel and multiples of 4"],
        ),
        (["model.params.image_key=img"], ["image_key: 'img'", "image, caption"]),
        ([f"{LOSS}.disc_conditional=true"], ["disc_conditional: false"]),
        pytest.param(
            *(["data.train.params.channel_first=true"], ["this host takes 3 channels"]),
            marks=EXTENDED,
        ),
    ],
)
def test_a_first_batch_that_does_not_fit_is_explained(run, photos, tmp_path, overrides, message):
    part = {"target": "folder", "params": {"root": str(photos), "size": 32}}
    config = {**shipped("custom_vqgan"), "data": {"batch_size": 2, "train": part}}
    code, said = run(config, "--max-steps", 1, *OFFLINE, *overrides)
    assert code == 2
    assert all(part in said for part in message), said
    assert "Traceback" not in said
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_hosts_own_failure_is_said_to_be_its_own(run, photos, tmp_path):
    (tmp_path / "their_host.py").write_text(
        "from taming.models.vqgan import VQModel\n"
        "class Broken(VQModel):\n"
        "    def decode(self, quant):\n"
        "        return {}['nothing here']\n"
    )
    config = shipped("custom_vqgan", target="their_host.Broken")
    code, said = run(config, "--data", photos, "--max-steps", 1, *OFFLINE)
    assert code == 2
    assert "Broken's own code failed" in said
    assert "their_host.py:4 in decode" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_resumed_run_keeps_its_folder_and_metrics(run, photos, tmp_path):
    words = ["--data", photos, "data.num_workers=0", *OFFLINE]
    assert run(shipped("custom_vqgan"), *words, "--max-steps", 1)[0] == 0
    assert run(shipped("custom_vqgan"), *words, "--max-steps", 2, "--resume", "auto")[0] == 0
    steps = [
        line.split(",")[0] for line in (tmp_path / "logs/a/metrics.csv").read_text().splitlines()
    ]
    assert steps == ["step", "1", "2"]


@pytest.mark.slow
def test_retrofit_cache_and_eval_take_the_folder(run, photos, tmp_path):
    old = shipped(
        "custom_vqgan", loss="taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    )
    quiet = [f"{LOSS}.perceptual_weight=0", "training.val_every=null", "training.images_every=null"]
    assert run(old, "--data", photos, "--max-steps", 1, *quiet)[0] == 0
    last = tmp_path / "logs/a/checkpoints/last.ckpt"
    assert load_checkpoint(last).step == 1
    guide = ["lgvq.guide.use=micro_clip"]
    words = ["--ckpt", last, "-o", "new", "--images", 4, "--no-progress", *quiet, *guide]
    code, said = run(old, *words, "--data", photos, "--max-steps", 1, command="retrofit")
    assert code == 0, said
    code, said = run(old, *words, command="retrofit")
    assert code == 2
    assert "--max-steps N" in said
    assert "--data FOLDER" in said
    new = shipped("custom_vqgan")
    out = ["-o", "cache", "--maskings", 0, "--no-progress", *OFFLINE]
    code, said = run(new, *out, "--data", photos, command="cache")
    assert code == 0, said
    code, said = run(new, *out, command="cache")
    assert code == 2
    measured = ["--ckpt", last, "--metrics", "psnr", "--json", "r.json", "--output", "e"]
    code, said = run(old, *measured, "--no-progress", "--data", photos, command="eval")
    assert code == 0, said
    assert json.loads((tmp_path / "r.json").read_text())["settings"]


def test_max_steps_is_a_number_of_the_section():
    config = with_shortcuts(read_config([], ["training.seed=1"]), max_steps=5)
    assert config.training == {"seed": 1, "max_steps": 5}
    with pytest.raises(ConfigError, match=r"training\.max_steps must be"):
        Sections.from_config({**shipped("vq-f4"), "training": {"max_steps": 0}})


def test_batches_are_as_they_were(photos):
    """The size that is filled in is what the data set gives."""
    from lgvq_plugin.training.build import build_dataset

    config = with_shortcuts(OmegaConf.create(shipped("vq-f4")), data=photos, max_steps=1)
    sample = build_dataset(Sections.from_config(config).data.train)[0]
    assert sample["image"].shape == (32, 32, 3)
    assert sample["image"].dtype == np.float32
