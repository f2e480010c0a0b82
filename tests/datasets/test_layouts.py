"""General layouts: tables, lists, tar shards, Hugging Face, class folders; and foreign readers."""

import io
import json
import tarfile

import pytest
from disk_trees import COUNT, captions, encoded, photo, write
from PIL import Image

from lgvq_plugin.datasets.base import recognize
from lgvq_plugin.datasets.folder import CaptionedFolder, ListFile, PairsTable
from lgvq_plugin.datasets.huggingface import HuggingFaceImages
from lgvq_plugin.datasets.webdataset import WebDataset
from lgvq_plugin.sockets import ConfigError


def captions_of(dataset):
    return [record.captions for record in dataset.records]


# Tables and lists


def test_a_comma_table_with_quoted_captions(tmp_path):
    photo(tmp_path / "a.jpg", 0)
    write(tmp_path / "x.csv", 'title,filepath\r\n"a dog, running ",a.jpg\r\n')
    assert captions_of(PairsTable(tmp_path / "x.csv")) == [("a dog, running",)]


def test_jsonl_with_a_list_of_captions_and_an_absolute_path(tmp_path):
    photo(tmp_path / "elsewhere/a.jpg", 0)
    row = {"image": str(tmp_path / "elsewhere/a.jpg"), "caption": ["one", "two"]}
    write(tmp_path / "x.jsonl", row)
    assert captions_of(PairsTable(tmp_path / "x.jsonl")) == [("one", "two")]


def test_a_table_that_is_missing_or_names_no_file(tmp_path):
    write(tmp_path / "x.csv", "a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"x\.csv:2: no file name"):
        PairsTable(tmp_path / "x.csv")
    with pytest.raises(ConfigError, match="no table of split 'train'"):
        PairsTable(tmp_path, "train")


def test_a_list_takes_captions_behind_a_tab_or_beside(tmp_path):
    for k in range(3):
        photo(tmp_path / f"{k}.jpg", k)
    write(tmp_path / "1.caption", "beside\n")
    write(tmp_path / "list.txt", "0.jpg\ta dog\n0.jpg\ta hound\n\n1.jpg\n2.jpg\n")
    dataset = ListFile(tmp_path / "list.txt")
    assert captions_of(dataset) == [("a dog", "a hound"), ("beside",), ()]


# Tar shards


def test_shards_written_by_the_webdataset_package(tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with wds.TarWriter(str(tmp_path / "train-000000.tar")) as sink:
        for k in range(COUNT):
            meta = {"caption": captions(k), "image_id": k}
            sink.write({"__key__": f"a/{k:04d}", "jpg": encoded(k), "json": meta})
    dataset = WebDataset(tmp_path, "train")
    assert captions_of(dataset) == [tuple(captions(k)) for k in range(COUNT)]
    assert dataset[3]["image_id"] == 3
    assert dataset[0]["file"] == "train-000000.tar:a/0000.jpg"


def test_img2dataset_keeps_its_text_and_ignores_the_rest(tmp_path):
    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000000000.jpg", encoded(0))
        add(tar, "000000000.json", json.dumps({"caption": "a dog", "url": "x"}).encode())
        add(tar, "000000000.txt", b"a dog")
        add(tar, "000000001.json", b'{"caption": "its image failed"}')
        add(tar, "000000002.jpg", encoded(2))
    assert captions_of(WebDataset(tmp_path)) == [("a dog",), ()]
    assert captions_of(WebDataset(f"{tmp_path}/{{00000..00000}}.tar")) == [("a dog",), ()]


def test_a_cut_off_shard_and_a_compressed_one_are_named(tmp_path, trees):
    trees["webdataset"](tmp_path)
    path = tmp_path / "shard_000001.tar"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ConfigError, match=r"shard_000001\.tar"):
        WebDataset(tmp_path)[5]
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "shard_000000.tar", "x.jpg")
    with pytest.raises(ConfigError, match=r"shard_000001\.tar.*uncompressed"):
        WebDataset(tmp_path)


def put(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard(path, keys, meta=None):
    """Write a shard of small photos with a .txt, and a .json if `meta` is given."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for key in keys:
            put(tar, f"{key}.png", picture.getvalue())
            put(tar, f"{key}.txt", f"text {key}".encode())
            if meta is not None:
                put(tar, f"{key}.json", json.dumps(meta).encode())
    return path


def test_a_pattern_of_shards_has_splits_too(tmp_path):
    shard(tmp_path / "cc3m-train-0000.tar", ["a", "b"])
    shard(tmp_path / "cc3m-train-0001.tar", ["c"])
    shard(tmp_path / "cc3m-val-0000.tar", ["d"])
    pattern = f"{tmp_path}/cc3m-train-{{0000..0001}}.tar::{tmp_path}/cc3m-val-0000.tar"
    found = {s: [c for r in WebDataset(pattern, s).records for c in r.captions]
            for s in ("train", "validation", "all")}  # fmt: skip
    assert found["train"] == ["text a", "text b", "text c"]
    assert found["validation"] == ["text d"]
    assert found["all"] == [*found["train"], *found["validation"]]


def test_rows_of_another_split_in_the_shards_of_a_split_are_refused(tmp_path):
    shard(tmp_path / "train-0000.tar", ["a", "b"], {"split": "test"})
    with pytest.raises(ConfigError, match=r"2 of 2 images of split 'train' say .* 'test'.*a\.png"):
        WebDataset(tmp_path, "train")


def test_one_shard_without_a_split_in_its_name_is_parted(tmp_path):
    path = shard(tmp_path / "pictures.tar", [f"{k:02d}" for k in range(40)])
    names = [{r.file for r in WebDataset(path, split, holdout=0.3).records}
             for split in ("train", "validation")]  # fmt: skip
    assert not names[0] & names[1]
    assert len(names[0]) + len(names[1]) == 40
    assert names[1]


def test_a_caption_key_is_taken_where_there_is_a_text_too(tmp_path):
    path = shard(tmp_path / "a.tar", ["x"], {"caption": "usual", "long": "another"})
    assert WebDataset(path).records[0].captions == ("text x",)
    assert WebDataset(path, caption_key="long").records[0].captions == ("another",)


def test_members_of_a_sample_need_not_be_adjacent(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.jpg", encoded(0)), ("b.jpg", encoded(1)),
                              ("b.txt", b"a dog"), ("a.txt", b"a cat")):  # fmt: skip
            put(tar, name, content)
    assert captions_of(WebDataset(tmp_path)) == [("a cat",), ("a dog",)]


def test_further_parts_of_a_suffix_are_read(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        put(tar, "sample0.input.jpg", encoded(0))
        put(tar, "sample0.outputs.txt", b"a cat")
    assert captions_of(WebDataset(tmp_path)) == [("a cat",)]


def test_of_several_images_the_plain_one_is_meant_or_the_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.mask.png"):
            put(tar, name, encoded(0))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name in ("a.input.jpg", "a.target.jpg"):
            put(tar, name, encoded(0))
    assert WebDataset(tmp_path / "0.tar")[0]["file"] == "0.tar:a.jpg"
    with pytest.raises(ConfigError, match=r"'a' has several.*input\.jpg, target\.jpg.*file_key"):
        WebDataset(tmp_path / "1.tar")
    named = WebDataset(tmp_path / "1.tar", file_key="target.jpg")
    assert named[0]["file"] == "1.tar:a.target.jpg"


def test_a_name_twice_in_a_shard_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.jpg"):
            put(tar, name, encoded(0))
    with pytest.raises(ConfigError, match=r"0\.tar: two members are called a\.jpg"):
        WebDataset(tmp_path)


@pytest.mark.parametrize(
    "meta", [5, [1], {"caption": 5}, {"caption": {"en": "x"}}, {"caption": [["x"]]}, True]
)
def test_a_caption_in_a_shard_that_is_no_text_is_named(tmp_path, meta):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        put(tar, "a.jpg", encoded(0))
        put(tar, "a.json", json.dumps(meta).encode())
    with pytest.raises(ConfigError, match=r"0\.tar: .* of 'a' must be text or a list of texts"):
        WebDataset(tmp_path)


def test_shards_without_images_or_captions_name_what_is_in_them(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        put(tar, "a.npy", b"x")
        put(tar, "a.txt", b"x")
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        put(tar, "a.jpg", encoded(0))
        put(tar, "a.json", b'{"label_text": "x"}')
    with pytest.raises(ConfigError, match=r"no images; the members' suffixes are \.npy, \.txt"):
        WebDataset(tmp_path / "0.tar")
    WebDataset(tmp_path / "1.tar")
    assert "none of 1 samples has a caption" in caplog.text
    assert "whose fields are label_text" in caplog.text


def test_missing_shards_are_counted(tmp_path):
    with pytest.raises(ConfigError, match="3 shards do not exist"):
        WebDataset(f"{tmp_path}/a_{{0..2}}.tar")
    with pytest.raises(ConfigError, match="no shards"):
        WebDataset(tmp_path)


# Hugging Face


@pytest.fixture
def imagefolder(tmp_path):
    for split, first in (("train", 0), ("validation", 4)):
        rows = ""
        for k in range(first, first + 2):
            photo(tmp_path / f"hf/{split}/{k}.jpg", k)
            rows += json.dumps({"file_name": f"{k}.jpg", "text": captions(k)[0]}) + "\n"
        write(tmp_path / f"hf/{split}/metadata.jsonl", rows)
    return tmp_path / "hf"


def test_imagefolder_reads_the_same_with_and_without_the_library(imagefolder, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", imagefolder.parent / "cache")
    for split in ("train", "validation"):
        theirs = HuggingFaceImages(imagefolder, split, size=16)
        ours = CaptionedFolder(imagefolder, split=split, size=16)
        assert captions_of(theirs) == captions_of(ours)
        assert all((theirs[i]["image"] == ours[i]["image"]).all() for i in range(2))
    assert recognize(imagefolder).member == "folder"


def test_parquet_files_with_image_bytes(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"image": {"bytes": encoded(k), "path": f"{k}.jpg"}, "caption": captions(k)[0]}
        for k in range(3)
    ]
    (tmp_path / "set/data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "set/data/train-00000-of-00001.parquet")
    layout = recognize(tmp_path / "set")
    assert layout.member == "huggingface"
    dataset = layout.build("train", size=16)
    assert captions_of(dataset) == [(captions(k)[0],) for k in range(3)]
    assert dataset[2]["image"].shape == (16, 16, 3)


def test_a_hugging_face_folder_may_lie_at_home(tmp_path, trees, monkeypatch):
    trees["huggingface"](tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(HuggingFaceImages("~/set")) == COUNT


@pytest.mark.slow
def test_a_column_that_is_not_there_is_captions_of(tmp_path, trees):
    params = trees["huggingface"](tmp_path)
    with pytest.raises(ConfigError, match=r"caption_column: 'txet'.*captions"):
        HuggingFaceImages(**params, caption_column="txet")
    with pytest.raises(ConfigError, match="split: 'test'"):
        HuggingFaceImages(**params, split="test")


# Folders


def test_class_folders_take_a_template(tmp_path):
    for k, name in enumerate(("brown_bear", "red_fox")):
        photo(tmp_path / name / "0.jpg", k)
    layout = recognize(tmp_path)
    assert captions_of(layout.build("all")) == [
        ("a photo of a brown bear",),
        ("a photo of a red fox",),
    ]


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for k in range(count):
            photo(tmp_path / split / f"{k}.jpg", k)
            write(tmp_path / split / f"{k}.txt", "a dog")
    assert len(CaptionedFolder(tmp_path, split="train")) == 3
    assert len(CaptionedFolder(tmp_path, split="validation")) == 1
    with pytest.raises(ConfigError, match="no split 'test'; its splits are train, validation"):
        CaptionedFolder(tmp_path, split="test")


def test_a_folder_without_captions_says_what_would_do(tmp_path):
    photo(tmp_path / "0.jpg", 0)
    with pytest.raises(ConfigError, match=r"no captions found.*caption_template"):
        CaptionedFolder(tmp_path)


def test_a_column_of_ones_own_called_source_does_not_part_the_set(tmp_path):
    rows = [{"file_name": f"{k}.jpg", "text": "a dog", "source": "flickr"} for k in range(40)]
    for row in rows:
        photo(tmp_path / row["file_name"], 1)
    write(tmp_path / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    sizes = [len(CaptionedFolder(tmp_path, split=s, holdout=0.3)) for s in ("train", "validation")]
    assert sum(sizes) == 40
    assert min(sizes) > 3


def test_holdout_parts_the_same_way_whatever_else_lies_there(tmp_path):
    for k in range(40):
        photo(tmp_path / f"{k}.jpg", 0)
        write(tmp_path / f"{k}.txt", "a dog")
    parts = [{r.file for r in CaptionedFolder(tmp_path, split=s).records} for s in ("train", "val")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    (tmp_path / "0.jpg").unlink()
    again = {r.file for r in CaptionedFolder(tmp_path, split="val").records}
    assert again == parts[1] - {"0.jpg"}


@pytest.mark.slow
def test_real_photos_and_emoji(shared):
    photos = recognize(shared / "coco_captioned_mini_256").build("all", size=256)
    assert (len(photos), photos[0]["image"].shape) == (476, (256, 256, 3))
    assert all(len(captions) >= 5 for captions in captions_of(photos))
    emoji = recognize(shared / "emoji_noto128").build("all", size=32)
    assert len(emoji) == 3530
    assert emoji[0]["captions"][0] == "hash sign"
    with Image.open(shared / "emoji_noto128/images" / emoji[0]["file"]) as image:
        assert image.size == (128, 128)
