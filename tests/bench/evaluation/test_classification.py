"""zeroshot, linear_probe and knn on a class folder, by a tokenizer of colored patches."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import binom

from lgvq_plugin import attach, cli
from lgvq_plugin.bench.classification import readable
from lgvq_plugin.bench.evaluate import EvaluationConfig
from lgvq_plugin.bench.evaluation import evaluate
from lgvq_plugin.sockets import ConfigError

COLORS = {"red": (200, 30, 30), "green": (40, 160, 60), "blue": (40, 60, 200)}
COLORS |= {"yellow": (230, 210, 40)}
SIZES = {"train": 24, "test": 30}
ALONE = {name: {"weight": 0} for name in ("masked_text", "relationship")}
NAMES = ["zeroshot", "linear_probe", "knn"]


def draw_class_folder(root):
    """root/split/color/x.png: a color and noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in SIZES.items():
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = 40 * torch.randn(4, 4, 3, generator=generator)
                pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
                image = Image.fromarray(pixels.numpy()).resize((32, 32))
                image.save(root / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    draw_class_folder(folder)
    return folder


@pytest.fixture
def config(root):
    def part(split):
        params = {"root": str(root), "split": split, "size": 32}
        return {"target": "folder", "params": {**params, "caption_template": "{}"}}

    data = {"batch_size": 8, "train": part("train"), "validation": part("test")}
    return {"data": data, "evaluation": {"guide": {"use": "micro_clip"}, "batch_size": 60}}


def images_of(root, split):
    from lgvq_plugin.datasets.folder import CaptionedFolder

    data = CaptionedFolder(root, split=split, size=32, caption_template="{}", channel_first=True)
    samples = [data[i] for i in range(len(data))]
    images = torch.stack([torch.from_numpy(sample["image"]) for sample in samples])
    return images, [sample["caption"] for sample in samples]


def trained_handle(palette, root, steps):
    handle = attach(
        palette, guide={"use": "micro_clip"}, objectives=ALONE, grid=[4, 4], gradient_ratio=None
    )
    images, captions = images_of(root, "train")
    optimizer = torch.optim.Adam(handle.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:32]
        palette(images[rows])
        handle.loss([captions[i] for i in rows])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle


def inside_binomial(row, chance):
    low, high = binom.interval(0.999, row["n"], chance)
    return low <= row["value"] * row["n"] <= high


@pytest.mark.slow
@pytest.mark.extended
def test_trained_heads_know_the_classes_and_shuffled_codes_are_chance(palette, config, root):
    handle = trained_handle(palette, root, 40)
    found = evaluate(palette, config, metrics=NAMES, heads=handle.heads, progress=False)["metrics"]
    for name in ("zeroshot", "linear_probe", "linear_probe/head", "knn", "knn/head"):
        assert found[f"{name}/accuracy"]["value"] > 0.9, name
        assert found[f"{name}/accuracy"]["n"] == 120
        assert inside_binomial(found[f"{name}/shuffled/accuracy"], 0.25), name
        assert not inside_binomial(found[f"{name}/accuracy"], 0.25), name
        assert found[f"{name}/shuffled/accuracy"]["higher_is_better"] is None
    assert found["zeroshot/chance@1"]["value"] == 0.25
    assert found["zeroshot/accuracy"]["settings"]["classes"] == {name: name for name in COLORS}


@pytest.mark.slow
def test_zero_shot_follows_from_the_public_encoders(palette, config, root):
    """Of untrained heads, so that there are mistakes to agree on."""
    handle = trained_handle(palette, root, 0)
    templates, names = ["a {} square", "a {} circle"], ["gray", "black", "red", "white"]
    options = {"templates": templates, "names": dict(zip(sorted(COLORS), names, strict=True))}
    options = {**config["evaluation"], "zeroshot": options}
    given = {"metrics": ["zeroshot"], "options": options, "progress": False}
    found = evaluate(palette, config, heads=handle.heads, **given)["metrics"]["zeroshot/accuracy"]
    images, captions = images_of(root, "test")
    prompts = []
    for name in names:
        each = handle.encode_text([text.format(name) for text in templates]).double().mean(dim=0)
        prompts.append(each / each.norm())
    best = (handle.encode_image(images).double() @ torch.stack(prompts).mT).argmax(dim=1)
    wanted = [float(sorted(COLORS)[i] == name) for i, name in zip(best, captions, strict=True)]
    assert found["per_image"] == wanted
    assert found["settings"]["templates"] == templates


@pytest.mark.slow
def test_other_heads_are_measured_again(palette, config, root, tmp_path):
    values = []
    for steps in (0, 40):
        handle = trained_handle(palette, root, steps)
        found = evaluate(palette, config, metrics=["zeroshot"], heads=handle.heads,
                         output=tmp_path, progress=False)["metrics"]  # fmt: skip
        values.append(found["zeroshot/accuracy"]["value"])
        handle.detach()
    assert values[1] > values[0] + 0.2


@pytest.mark.slow
def test_a_baseline_has_probes_but_no_zero_shot(palette, config):
    result = evaluate(palette, config, metrics=NAMES, progress=False)
    assert "the tokenizer has no heads of LG-VQ" in result["skipped"]["zeroshot"]
    assert {"linear_probe/accuracy", "knn/accuracy"} <= result["metrics"].keys()
    assert not any("head" in name for name in result["metrics"])


@pytest.mark.slow
def test_labels_of_the_scenes_are_tasks_of_their_own(palette):
    def part(split, length):
        return {"target": "scenes", "params": {"size": 32, "split": split, "length": length}}

    data = {"batch_size": 8, "train": part("train", 64), "validation": part("validation", 24)}
    handle = attach(palette, guide={"use": "micro_clip"}, grid=[4, 4])
    result = evaluate(
        palette, {"data": data}, metrics=["zeroshot", "knn"], heads=handle.heads, progress=False
    )
    shown = {name.split("/")[1] for name in result["metrics"] if name.startswith("zeroshot/")}
    assert shown == {"main_color", "main_shape", "background", "background_color"}
    assert "knn/count/accuracy" in result["metrics"]  # 0 to 4: no words for a prompt
    names = result["metrics"]["zeroshot/main_shape/accuracy"]["settings"]["classes"]
    assert "circle" in names


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"zeroshot": {"templates": ["a photo"]}}, "zeroshot.templates: expected prompts with one"),
        ({"zeroshot": {"templates": []}}, "templates"),
        ({"zeroshot": {"template": "{}"}}, "did you mean 'templates'"),
        ({"zeroshot": {"names": {"n01440764": ""}}}, "names.n01440764: expected the words"),
        ({"knn": {"k": 0}}, "knn.k: expected a whole number >= 1"),
    ],
)
def test_wrong_options_are_named(block, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig.from_dict(block)


@pytest.mark.slow
def test_folders_that_say_nothing_need_names(palette, config, root, tmp_path):
    for split in SIZES:
        for number, name in enumerate(COLORS):
            shutil.copytree(root / split / name, tmp_path / split / f"n0144076{number}")
    text = (
        json.dumps(config["data"])
        .replace(str(root), str(tmp_path))
        .replace('"{}"', '"a photo of a {}"')
    )
    config = {**config, "data": json.loads(text)}
    handle = trained_handle(palette, root, 40)
    given = {"metrics": ["zeroshot", "psnr"], "heads": handle.heads, "progress": False}
    result = evaluate(palette, config, **given)
    assert "'n01440760' says nothing about its images" in result["skipped"]["zeroshot"]
    names = {f"n0144076{number}": name for number, name in enumerate(COLORS)}
    options = {**config["evaluation"], "zeroshot": {"names": names, "templates": "{}"}}
    found = evaluate(palette, config, options=options, **given)["metrics"]
    assert found["zeroshot/accuracy"]["value"] > 0.9


def test_without_classes_the_error_says_what_is_expected(palette, root):
    part = {"target": "folder", "params": {"root": str(root / "test" / "red"), "size": 32}}
    (root / "test" / "red" / "captions.txt").write_text(
        "".join(f"{number}.png\ta red square\n" for number in range(SIZES["test"]))
    )
    try:
        with pytest.raises(ConfigError, match=r"root/class_name/x.jpg, at least two"):
            evaluate(palette, {"data": {"train": part, "test": part}}, metrics=["knn"])
    finally:
        (root / "test" / "red" / "captions.txt").unlink()


def test_names_of_folders_become_words():
    assert readable("golden_retriever") == "golden retriever"
    assert readable("3_series") == "series"
    assert readable("42") == "42"


@pytest.mark.slow
def test_the_command_takes_the_heads_of_a_run(root, tmp_path, capsys):
    loss = "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss"
    lossconfig = {"target": loss, "params": {"lgvq": {"guide": {"use": "micro_clip"}}}}
    params = {"n_embed": 16, "embed_dim": 8, "channels": 8, "num_res_blocks": 1, "downsample": 4}
    model = {"target": "vqvae", "params": {**params, "lossconfig": lossconfig}}
    config = {"model": {**model, "learning_rate": 1e-3}, "training": {"images_every": None}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    common = ["--data", root, "--no-progress", "data.train.params.size=32", "data.num_workers=0"]
    argv = ["train", "-b", tmp_path / "c.yaml", "--max-steps", 2, "--train", "heads"]
    argv += ["--logdir", tmp_path, "-n", "run", "training.accelerator=cpu"]
    assert cli.main([*map(str, [*argv, *common])]) == 0
    argv = ["eval", "--ckpt", tmp_path / "run", "--metrics", ",".join(NAMES), "-o", tmp_path / "o"]
    assert cli.main([*map(str, [*argv, *common])]) == 0
    shown = capsys.readouterr().out
    for name in ("zeroshot/accuracy", "linear_probe/head/accuracy", "knn/accuracy"):
        assert name in shown
