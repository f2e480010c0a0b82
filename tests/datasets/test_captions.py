"""Captions come from what the files say, never from names of folders; splits as rows say."""

import json

import pytest
from disk_trees import photo, write

from lgvq_plugin.datasets.base import recognize
from lgvq_plugin.datasets.check import as_text, check
from lgvq_plugin.datasets.folder import CaptionedFolder, ListFile, PairsTable
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError


def captions_of(dataset):
    return {record.file: record.captions for record in dataset.records}


def photos(folder, count):
    for k in range(count):
        photo(folder / f"{k}.jpg", k)
    return folder


def rows(*entries):
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


# Layouts


def test_flickr8k_as_kaggle_has_it(tmp_path):
    photos(tmp_path / "Images", 2)
    write(tmp_path / "captions.txt", 'image,caption\n0.jpg,A dog .\n0.jpg,"A dog, running"\n'
          "1.jpg,A cat, sleeping on a mat\n")  # fmt: skip
    layout = recognize(tmp_path)
    expected = {"0.jpg": ("A dog .", "A dog, running"), "1.jpg": ("A cat, sleeping on a mat",)}
    assert (layout.member, captions_of(layout.build("all"))) == ("folder", expected)


@pytest.fixture
def flickr8k(tmp_path):
    """The published tree, with its two files of scores, which pair images with captions."""
    photos(tmp_path / "Flicker8k_Dataset", 4)
    texts = tmp_path / "Flickr8k_text"
    lines = "".join(f"{k}.jpg#{c}\tA dog {c} of {k} .\n" for k in range(4) for c in range(2))
    write(texts / "Flickr8k.token.txt", lines)
    write(texts / "Flickr8k.lemma.token.txt", lines)
    write(texts / "ExpertAnnotations.txt", "0.jpg\t1.jpg#2\t1\t1\t1\n")
    write(texts / "Flickr_8k.trainImages.txt", "0.jpg\n1.jpg\n")
    write(texts / "Flickr_8k.devImages.txt", "2.jpg\n")
    write(texts / "Flickr_8k.testImages.txt", "3.jpg\n")
    return tmp_path


def test_flickr8k_as_published_with_its_splits(flickr8k):
    layout = recognize(flickr8k)
    found = {split: captions_of(layout.build(split)) for split in layout.splits}
    assert {split: list(files) for split, files in found.items()} == {
        "train": ["0.jpg", "1.jpg"],
        "validation": ["2.jpg"],
        "test": ["3.jpg"],
    }
    assert found["test"]["3.jpg"] == ("A dog 0 of 3 .", "A dog 1 of 3 .")


def test_flickr30k_with_its_row_that_lacks_a_bar(tmp_path, caplog):
    photos(tmp_path / "flickr30k_images", 2)
    write(tmp_path / "flickr30k_images/results.csv", "image_name| comment_number| comment\n"
          '0.jpg| 0| " Hi , " he says .\n0.jpg| 1| A man .\n'
          "1.jpg| 0| A dog\n1.jpg| 4   A cat\n")  # fmt: skip
    dataset = recognize(tmp_path).build("all")
    assert captions_of(dataset) == {"0.jpg": ('" Hi , " he says .', "A man ."), "1.jpg": ("A dog",)}
    assert "results.csv:5: 1 rows have fewer fields" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", [{"image": "0.jpg", "caption": "a dog"},
                           {"image": "1.jpg", "caption": "b"}]),
        ("captions.json", {"0.jpg": ["a dog"], "1.jpg": "b"}),
        ("dataset_flickr8k.json", {"images": [
            {"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a dog"}]},
            {"filename": "1.jpg", "split": "restval", "sentences": [{"raw": "b"}]}]}),
        ("notes.csv", 'filename,raw\n0.jpg,"[""a dog""]"\n1.jpg,"[\'b\']"\n'),
        ("Captions.csv", "Image;Caption\n0.jpg;a dog\n1.jpg;b\n"),
        ("list.txt", "images/0.jpg a dog\nimages/1.jpg b\n"),
        ("results.token", "0.jpg#0\ta dog\n1.jpg#0\tb\n"),
        ("captions.txt", "image_id\tcaption\n0\ta dog\n1\tb\n"),
    ],
)  # fmt: skip
def test_tables_of_many_makes(tmp_path, name, content):
    photos(tmp_path / "images", 2)
    write(tmp_path / name, content)
    assert list(captions_of(CaptionedFolder(tmp_path)).values()) == [("a dog",), ("b",)]


def test_unusual_columns_can_be_named(tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / "t.csv", "bild,text_de\n0.jpg,ein Hund\n")
    keys = {"file_key": "bild", "caption_key": "text_de"}
    for dataset in (CaptionedFolder(tmp_path, **keys), PairsTable(tmp_path / "t.csv", **keys)):
        assert captions_of(dataset) == {"0.jpg": ("ein Hund",)}
    with pytest.raises(ConfigError, match=r"t\.csv:2: no file name.*file_key.*bild, text_de"):
        PairsTable(tmp_path / "t.csv")


# Nothing is invented


@pytest.mark.parametrize("folders", [["Images"], ["00000", "01000"], ["n01440764", "n01443537"]])
def test_folders_that_say_nothing_are_no_classes(tmp_path, folders):
    for folder in folders:
        photos(tmp_path / folder, 2)
    layout = recognize(tmp_path)
    with pytest.raises(ConfigError, match="no captions found"):
        layout.build("all")


def test_a_file_that_cannot_be_read_as_captions_is_named(tmp_path):
    photos(tmp_path / "Images", 2)
    write(tmp_path / "captions.xml", "<c>a dog</c>")
    write(tmp_path / "other.txt", "see 1.jpg")
    with pytest.raises(ConfigError, match=r"captions\.xml, other\.txt could hold captions"):
        recognize(tmp_path).build("all")


@pytest.mark.parametrize("line", ["{}.jpg 3", "{}.jpg\t3", "{}.jpg,0 0.5 0.5 .1 .2"])
def test_class_numbers_are_no_captions(tmp_path, line):
    photos(tmp_path, 2)
    write(tmp_path / "list.txt", "".join(line.format(k) + "\n" for k in range(2)))
    with pytest.raises(ConfigError, match=r"all captions are numbers, first: .* of 0\.jpg"):
        ListFile(tmp_path / "list.txt")


def test_a_bare_name_that_two_folders_have_is_refused(tmp_path):
    photos(tmp_path / "a", 1)
    photos(tmp_path / "b", 1)
    write(tmp_path / "captions.jsonl", rows({"file_name": "0.jpg", "text": "a dog"}))
    with pytest.raises(ConfigError, match=r"'0.jpg' could be .*a/0.jpg or .*b/0.jpg"):
        CaptionedFolder(tmp_path)


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    photos(tmp_path, 3)
    write(tmp_path / "captions.csv", 'file,caption\n0.jpg,"a dog\n1.jpg,a "cat"\n2.jpg,b\n')
    with pytest.raises(ConfigError, match=r"captions\.csv:\d: a double quote is not closed"):
        CaptionedFolder(tmp_path)


# Splits


@pytest.fixture(params=["captions.jsonl", "metadata.csv"])
def split_table(request, tmp_path):
    """A folder of six images with a table whose rows name their splits."""
    photos(tmp_path, 6)
    splits = ["train", "train", "train", "val", "test", "test"]
    if request.param.endswith("jsonl"):
        entries = [{"file_name": f"{k}.jpg", "text": f"dog {k}", "split": s}
                   for k, s in enumerate(splits)]  # fmt: skip
        write(tmp_path / request.param, rows(*entries))
    else:
        lines = [f"{k}.jpg,dog {k},{split}" for k, split in enumerate(splits)]
        write(tmp_path / request.param, "\n".join(["file_name,text,split", *lines]))
    return tmp_path / request.param


def test_train_does_not_see_test(split_table):
    for build in (
        lambda **params: CaptionedFolder(split_table.parent, **params),
        lambda **params: PairsTable(split_table, **params),
    ):
        files = {s: list(captions_of(build(split=s))) for s in ("train", "val", "test", "all")}
        assert files["train"] == ["0.jpg", "1.jpg", "2.jpg"]
        assert files["val"] == ["3.jpg"]
        assert files["test"] == ["4.jpg", "5.jpg"]
        assert len(files["all"]) == 6
        with pytest.raises(ConfigError, match=r"names the splits .* `split` is not set"):
            build()
    for root in (split_table, split_table.parent):
        assert list(recognize(root).splits) == ["train", "validation", "test"]


def test_a_table_at_the_root_leaves_split_folders_on(tmp_path):
    for split in ("train", "test"):
        photos(tmp_path / split, 2)
    write(tmp_path / "metadata.csv", "file_name,text\ntrain/0.jpg,a\ntrain/1.jpg,b\ntest/0.jpg,c\n")
    assert list(recognize(tmp_path).splits) == ["train", "test"]
    assert list(captions_of(CaptionedFolder(tmp_path, split="train"))) == [
        "train/0.jpg",
        "train/1.jpg",
    ]
    assert list(captions_of(CaptionedFolder(tmp_path, split="test"))) == ["test/0.jpg"]


def test_one_image_in_two_splits_is_refused(tmp_path):
    photos(tmp_path, 1)
    row = {"file_name": "0.jpg", "text": "a dog"}
    table = rows({**row, "split": "train"}, {**row, "split": "test"})
    write(tmp_path / "captions.jsonl", table)
    with pytest.raises(ConfigError, match=r"captions\.jsonl:2: the same image is in split 'train'"):
        CaptionedFolder(tmp_path, split="train")


def test_class_folders_in_split_folders_take_a_template(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            photos(tmp_path / split / name, 1)
    assert set(captions_of(recognize(tmp_path).build("validation")).values()) == {
        ("a photo of a cat",),
        ("a photo of a dog",),
    }


# Encodings


@pytest.mark.parametrize("layout", ["sidecar", "table", "list"])
def test_text_of_another_encoding_is_counted_and_can_be_read(tmp_path, layout, caplog):
    photos(tmp_path, 1)
    text = {
        "sidecar": "un café …",
        "table": "file,caption\n0.jpg,un café …",
        "list": "0.jpg\tun café …",
    }
    name = {"sidecar": "0.txt", "table": "captions.csv", "list": "list.txt"}[layout]
    write(tmp_path / name, text[layout].encode("cp1252"))
    build, root = (
        (ListFile, tmp_path / name) if layout == "list" else (CaptionedFolder, tmp_path)
    )  # fmt: skip
    assert captions_of(build(root)) == {"0.jpg": ("un caf\ufffd \ufffd",)}
    assert "1 captions are not utf-8: 2 bytes became U+FFFD, first in 0.jpg" in caplog.text
    caplog.clear()
    assert captions_of(build(root, encoding="cp1252")) == {"0.jpg": ("un café …",)}
    assert not caplog.records
    with pytest.raises(ConfigError, match="encoding: 'utf-99' is not known"):
        build(root, encoding="utf-99")


def test_utf_16_is_known_by_its_mark(tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / "captions.csv", "file,caption\n0.jpg,un café\n".encode("utf-16"))
    assert captions_of(CaptionedFolder(tmp_path)) == {"0.jpg": ("un café",)}


# What a training run asks for


def test_the_number_of_captioned_images_is_known_without_opening_one(tmp_path):
    photos(tmp_path, 3)
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(b"")
    write(tmp_path / "1.txt", "a dog")
    dataset = CaptionedFolder(tmp_path)
    assert [dataset.captions_of(i) for i in range(3)] == [[], ["a dog"], []]


@pytest.mark.parametrize(("channels", "first"), [(1, True), (4, False)])
def test_scenes_have_the_asked_shape_and_a_second_key(channels, first):
    sample = Scenes(size=[16, 32], channels=channels, channel_first=first, image_key="img")[0]
    assert sample["img"].shape == ((channels, 16, 32) if first else (16, 32, channels))
    assert sample["image"] is sample["img"]


@pytest.mark.parametrize("line", ["{}.jpg\tmasks/{}.png", "{}.jpg nan", "{}.jpg n01440764"])
def test_paths_empty_cells_and_class_names_are_no_captions(tmp_path, line):
    photos(tmp_path, 2)
    write(tmp_path / "list.txt", "".join(line.format(k, k) + "\n" for k in range(2)))
    with pytest.raises(ConfigError, match=r"all captions are .*, first: .* of 0\.jpg"):
        ListFile(tmp_path / "list.txt")


@pytest.mark.parametrize("column", ["Split", "set", "subset", "partition"])
def test_a_column_of_splits_may_have_another_name(tmp_path, column):
    photos(tmp_path, 2)
    table = f"image,caption,{column}\n0.jpg,a dog,train\n1.jpg,a cat,test\n"
    write(tmp_path / "captions.csv", table)
    assert captions_of(CaptionedFolder(tmp_path, split="train")) == {"0.jpg": ("a dog",)}


def test_a_column_called_set_that_names_no_split_is_none(tmp_path):
    photos(tmp_path, 2)
    write(tmp_path / "captions.csv", "image,caption,set\n0.jpg,a dog,A\n1.jpg,a cat,B\n")
    assert len(CaptionedFolder(tmp_path)) == 2


@pytest.mark.parametrize(
    ("train", "test"),
    [("train2017", "test2017"), ("train_images", "test_images"), ("images/train", "images/test")],
)
def test_folders_below_a_table_name_the_splits(tmp_path, train, test):
    photo(tmp_path / train / "a.jpg", 1)
    photo(tmp_path / test / "b.jpg", 2)
    write(tmp_path / "captions.csv", "image,caption\na.jpg,a dog\nb.jpg,a cat\n")
    assert captions_of(CaptionedFolder(tmp_path, split="train")) == {"a.jpg": ("a dog",)}


def test_rows_of_another_split_in_the_folder_of_a_split_are_refused(tmp_path):
    photos(tmp_path / "train", 2)
    table = rows(*({"file_name": f"{k}.jpg", "text": "a dog", "split": s}
                   for k, s in enumerate(["train", "test"])))  # fmt: skip
    write(tmp_path / "train" / "captions.jsonl", table)
    with pytest.raises(ConfigError, match=r"1 of 2 images of split 'train' say .* 'test'.* 1\.jpg"):
        CaptionedFolder(tmp_path, split="train")


# Nothing is left out or mixed in silently


@pytest.mark.parametrize(
    "line",
    ['0.jpg,"a ""red"" dog"', '"0.jpg","a ""red"" dog"', '0.jpg\t"a ""red"" dog"',
     '0.jpg|0|a "red" dog', '0.jpg\t0\ta "red" dog', '0.jpg#0\ta "red" dog'],
)  # fmt: skip
def test_a_line_without_header_may_quote_and_number_its_caption(tmp_path, line):
    photos(tmp_path, 1)
    write(tmp_path / "captions.txt", f"{line}\n")
    for dataset in (CaptionedFolder(tmp_path), ListFile(tmp_path / "captions.txt")):
        assert list(captions_of(dataset).values()) == [('a "red" dog',)]


def test_further_columns_without_a_header_are_refused(tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / "list.txt", "0.jpg\ta dog\ttrain\n")
    with pytest.raises(ConfigError, match=r"list\.txt:1: 3 columns and no header"):
        ListFile(tmp_path / "list.txt")


def test_images_that_the_table_does_not_list_are_reported(tmp_path):
    photos(tmp_path, 3)
    write(tmp_path / "0.txt", "a dog")
    write(tmp_path / "captions.csv", "file,caption\n1.jpg,a cat\n")
    assert captions_of(CaptionedFolder(tmp_path)) == {"1.jpg": ("a cat",)}
    shown = as_text(check(tmp_path, progress=False))
    expected = f"2 images of the folder are not in the table and left out, first: {tmp_path}/0.jpg"
    assert expected in shown


def test_two_columns_of_one_name_are_refused(tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / "captions.csv", "image,caption,caption\n0.jpg,a dog,a hound\n")
    with pytest.raises(ConfigError, match=r"captions\.csv:1: the header names 'caption' 2 times"):
        CaptionedFolder(tmp_path)


@pytest.mark.parametrize(
    "names", ["caption,caption2", "caption_1,caption_2", "Caption 0,Caption 1"]
)
def test_numbered_columns_are_further_captions(tmp_path, names):
    photos(tmp_path, 1)
    write(tmp_path / "captions.csv", f"image,{names}\n0.jpg,a dog,a hound\n")
    assert captions_of(CaptionedFolder(tmp_path)) == {"0.jpg": ("a dog", "a hound")}


@pytest.mark.parametrize(
    ("column", "values"), [("is_test", "01"), ("is_train", ["True", "False"]), ("IsTesting", "NY")]
)
def test_a_column_of_flags_names_the_split(tmp_path, column, values):
    photos(tmp_path, 2)
    table = f"image,caption,{column}\n0.jpg,a dog,{values[0]}\n1.jpg,a cat,{values[1]}\n"
    write(tmp_path / "captions.csv", table)
    assert list(recognize(tmp_path).splits) == ["train", "test"]
    assert captions_of(CaptionedFolder(tmp_path, split="test")) == {"1.jpg": ("a cat",)}


def test_a_folder_of_one_table_per_split_points_to_pairs_table(tmp_path):
    photos(tmp_path, 2)
    for k, split in enumerate(("train", "test")):
        write(tmp_path / f"{split}.csv", f"image,caption\n{k}.jpg,a dog\n")
    assert recognize(tmp_path).member == "pairs_table"
    with pytest.raises(ConfigError, match=r"`target: pairs_table` reads test\.csv, train\.csv"):
        CaptionedFolder(tmp_path, split="train")
