"""Quirks of the published data sets, in miniature trees and in their real files."""

import gzip
import json
import pickle

import numpy as np
import pytest
from disk_trees import COCO_IDS, COUNT, captions, photo, write
from disk_trees import coco as coco_tree

from lgvq_plugin.datasets import coco
from lgvq_plugin.datasets.coco import VQA2, Coco, CocoQA
from lgvq_plugin.datasets.pickled import CUB200, CelebAHQ, TextCaps
from lgvq_plugin.sockets import ConfigError


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# COCO


def test_coco_finds_images_of_short_ids_and_trims_captions(tmp_path):
    dataset = Coco(**coco_tree(tmp_path, year=2014))
    assert [dataset[i]["image_id"] for i in range(COUNT)] == list(COCO_IDS)
    assert dataset[0]["file"] == "COCO_train2014_000000000009.jpg"
    assert dataset[0]["captions"] == captions(0)


def test_coco_reads_2014_captions_over_2017_folders(tmp_path):
    coco_tree(tmp_path, year=2014)
    (tmp_path / "train2014").rename(tmp_path / "gone")
    for k, number in enumerate(COCO_IDS):
        photo(tmp_path / f"val2017/{number:012d}.jpg", k)
    assert len(Coco(tmp_path)) == COUNT


def test_coco_of_both_years_wants_a_year(tmp_path):
    coco_tree(tmp_path, year=2014)
    coco_tree(tmp_path, year=2017)
    with pytest.raises(ConfigError, match="year: 2014"):
        Coco(tmp_path)
    assert Coco(tmp_path, year=2017)[0]["file"] == "000000000009.jpg"


def test_coco_image_without_caption_stays(tmp_path):
    coco_tree(tmp_path)
    path = tmp_path / "annotations/captions_train2017.json"

    def change(content):
        notes = content["annotations"]
        content["annotations"] = [n for n in notes if n["image_id"] != 25]
        content["annotations"] += [{"image_id": 25, "id": 1, "caption": " \n"}]

    edit(path, change)
    dataset = Coco(tmp_path)
    assert len(dataset) == COUNT
    assert (dataset[1]["caption"], dataset[1]["captions"]) == ("", [])


def test_coco_missing_images_are_counted_and_named(tmp_path):
    coco_tree(tmp_path)
    (tmp_path / "train2017/000000000025.jpg").unlink()
    with pytest.raises(ConfigError, match=r"1 of 6 images.*000000000025\.jpg.*skip_corrupt"):
        Coco(tmp_path)
    assert Coco(tmp_path, skip_corrupt=True)[1]["image_id"] == 30


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("{", "not readable as JSON"),
        ({"images": []}, "expected an object with a list 'annotations'"),
        ({"images": [], "annotations": [{"id": 1}]}, r"annotations\[0\] has no image_id, caption"),
    ],
)
def test_coco_file_of_another_kind_is_reported(tmp_path, content, texts):
    write(tmp_path / "annotations/captions_train2017.json", content)
    with pytest.raises(ConfigError, match=rf"captions_train2017\.json.*{texts}"):
        Coco(tmp_path)


def test_coco_karpathy_split(tmp_path):
    coco_tree(tmp_path, year=2014)
    splits = ["train", "restval", "val", "test", "train", "restval"]
    images = [
        {
            "filepath": "train2014",
            "filename": f"COCO_train2014_{number:012d}.jpg",
            "cocoid": number,
            "imgid": k,
            "split": splits[k],
            "sentids": [k],
            "sentences": [{"raw": f"{captions(k)[0]}  ", "tokens": [], "sentid": k, "imgid": k}],
        }
        for k, number in enumerate(COCO_IDS)
    ]
    write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": images})
    options = {"karpathy": "dataset_coco.json"}
    assert [r.extra["image_id"] for r in Coco(tmp_path, "train", **options).records] == [9, 36]
    both = Coco(tmp_path, "train", restval=True, **options)
    assert [r.extra["image_id"] for r in both.records] == [9, 25, 36, 123456]
    assert Coco(tmp_path, "val", **options)[0]["captions"] == ["caption 0 of 2"]
    for split in ("val", "test"):
        assert len(Coco(tmp_path, split, restval=True, **options)) == 1


def test_coco_instances_give_objects_and_labels(tmp_path):
    coco_tree(tmp_path)
    notes = [
        {"image_id": 9, "category_id": 18, "bbox": [1.5, 2, 3, 4], "iscrowd": 0, "id": 1},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1, "id": 2},
    ]
    kinds = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
    content = {"images": [], "annotations": notes, "categories": kinds}
    write(tmp_path / "annotations/instances_train2017.json", content)
    dataset = Coco(tmp_path, instances=True)
    assert dataset.attribute_names() == {"has_object": ("person", "dog")}
    assert dataset[0]["attributes"]["has_object"].tolist() == [1, 1]
    assert dataset[1]["attributes"]["has_object"].tolist() == [0, 0]
    expected = {"name": "person", "box": (0, 0, 9, 9), "is_crowd": True}
    assert dataset[0]["objects"][1] == expected


@pytest.mark.slow
def test_coco_real_captions_of_2017(shared, tmp_path):
    root = shared / "coco_val2014_captions"
    dataset = Coco(root, "validation", skip_corrupt=True)
    assert len(dataset) == 5000
    texts = [text for record in dataset.records for text in record.captions]
    assert len(texts) == 25014
    assert all(text == " ".join(text.split()) for text in texts)
    # The photos we hold have the captions of another source; the same ones must come out.
    known = {}
    with gzip.open(root / "captions_val2014_by_image.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            number = row.get("image_id", row.get("id"))
            known[number] = sorted(" ".join(text.split()) for text in row["captions"])
    same = [sorted(r.captions) == known.get(r.extra["image_id"]) for r in dataset.records]
    assert all(same)


# COCO-QA and VQA v2


def test_cocoqa_questions_belong_to_their_image(tmp_path, trees):
    dataset = CocoQA(**trees["cocoqa"](tmp_path))
    assert dataset[0]["questions"] == [
        {"question": "what is on the bed ?", "answer": "cat", "type": "object"},
        {"question": "what is the color of the cat ?", "answer": "black", "type": "color"},
    ]


def test_cocoqa_reads_a_captions_file_once(tmp_path, trees, monkeypatch):
    params, read, plain = trees["cocoqa"](tmp_path), [], coco.read_json
    monkeypatch.setattr(coco, "read_json", lambda path: (read.append(path), plain(path))[1])
    assert CocoQA(**params)[0]["captions"] == captions(0)
    assert len(read) == len(set(read)) == 1


def test_cocoqa_takes_images_of_2017_and_needs_no_captions(tmp_path, trees):
    trees["cocoqa"](tmp_path / "qa")
    for k, number in enumerate(COCO_IDS):
        part = "train" if k % 2 else "val"
        photo(tmp_path / f"photos/{part}2017/{number:012d}.jpg", k)
    dataset = CocoQA(tmp_path / "qa/cocoqa", images=tmp_path / "photos")
    assert dataset[0]["file"] == "000000000009.jpg"
    assert dataset[0]["caption"] == ""


def test_cocoqa_files_that_do_not_align_are_reported(tmp_path, trees):
    trees["cocoqa"](tmp_path)
    path = tmp_path / "cocoqa/train/answers.txt"
    path.write_text(path.read_text() + "dog\n")
    with pytest.raises(ConfigError, match=r"answers\.txt 13.*types\.txt 12"):
        CocoQA(tmp_path)


def test_vqa2_keeps_ten_answers(tmp_path, trees):
    question = VQA2(**trees["vqa2"](tmp_path))[0]["questions"][0]
    assert question["answers"] == ["yes"] * 7 + ["no"] * 3
    assert (question["answer"], question["type"]) == ("yes", "yes/no")


@pytest.mark.slow
def test_vqa2_real_questions(shared, tmp_path):
    for name, official in (
        ("vqa_questions_valid", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("vqa_annotatons_valid", "v2_mscoco_val2014_annotations.json"),
    ):
        content = gzip.decompress((shared / f"vqa_v2_60k/{name}.gzip").read_bytes())
        write(tmp_path / official, content)
    photos = shared / "coco_captioned_mini_256/images"
    dataset = VQA2(tmp_path, "val", images=photos, drop_missing=True)
    assert 0 < len(dataset) < 100
    questions = [q for i in range(len(dataset)) for q in dataset[i]["questions"]]
    assert all(len(q["answers"]) == 10 for q in questions)
    # The official answer is a most frequent one.
    share = [q["answers"].count(q["answer"]) == max(map(q["answers"].count, q["answers"]))
             for q in questions]  # fmt: skip
    assert np.mean(share) > 0.95


# TextCaps


def test_textcaps_validation_images_lie_in_train_images(tmp_path, trees):
    trees["textcaps"](tmp_path)
    path = tmp_path / "TextCaps_0.1_train.json"
    path.rename(tmp_path / "TextCaps_0.1_val.json")
    dataset = TextCaps(tmp_path, "validation")
    assert dataset[0]["captions"] == captions(0)
    with pytest.raises(ConfigError, match=r"TextCaps_0\.1_train\.json"):
        TextCaps(tmp_path)


def test_textcaps_test_has_no_captions(tmp_path):
    photo(tmp_path / "test_images/00aa00aa00aa00aa.jpg", 0)
    rows = [{"image_id": "00aa00aa00aa00aa", "image_path": "test/00aa00aa00aa00aa.jpg"}]
    write(tmp_path / "TextCaps_0.1_test.json", {"dataset_type": "test", "data": rows})
    assert TextCaps(tmp_path, "test")[0]["caption"] == ""


def test_textcaps_as_the_lg_vq_code_lays_it_out(tmp_path):
    photo(tmp_path / "train_images/0a.jpg", 0)
    write(tmp_path / "text/0a.txt", "a sign \r\nred text\r\n")
    write(tmp_path / "train_filenames.pickle", pickle.dumps(["0a"]))
    write(tmp_path / "valid_filenames.pickle", pickle.dumps(["0a"]))
    for split in ("train", "validation"):
        assert TextCaps(tmp_path, split)[0]["captions"] == ["a sign", "red text"]


# CelebA-HQ


def test_celeba_hq_as_the_lg_vq_code_lays_it_out(tmp_path, trees):
    trees["celeba_hq"](tmp_path)
    (tmp_path / "image").rename(tmp_path / "images")
    (tmp_path / "text").rename(tmp_path / "celeba-caption")
    dataset = CelebAHQ(tmp_path)
    assert dataset[1]["file"] == "17.jpg"
    assert dataset[1]["captions"] == captions(1)  # written with Windows line ends
    with pytest.raises(ConfigError, match=r"test/filenames\.pickle does not exist"):
        CelebAHQ(tmp_path, "test")


def test_celeba_hq_attributes_follow_the_number(tmp_path, trees):
    trees["celeba_hq"](tmp_path)
    rows = "".join(f"{k * 17}.jpg  {1 if k == 2 else -1} 1\n" for k in range(COUNT))
    write(tmp_path / "CelebAMask-HQ-attribute-anno.txt", f"{COUNT}\nBald Smiling\n{rows}")
    dataset = CelebAHQ(tmp_path)
    assert dataset.attribute_names() == {"face": ("Bald", "Smiling")}
    assert dataset[2]["attributes"]["face"].tolist() == [1, 1]
    assert dataset[3]["attributes"]["face"].tolist() == [0, 1]


def test_celeba_hq_attribute_file_of_one_line_is_reported(tmp_path, trees):
    trees["celeba_hq"](tmp_path)
    write(tmp_path / "CelebAMask-HQ-attribute-anno.txt", f"{COUNT}\n")
    with pytest.raises(ConfigError, match="expected a count, a line of names"):
        CelebAHQ(tmp_path)


def test_celeba_hq_all_needs_no_split_file_and_counts_by_number(tmp_path, trees):
    trees["celeba_hq"](tmp_path)
    names = [record.file for record in CelebAHQ(tmp_path, "all").records]
    assert names == [f"{k * 17}.jpg" for k in range(COUNT)]


# CUB-200-2011


def test_cub_matches_captions_in_spite_of_other_names(tmp_path, trees):
    dataset = CUB200(**trees["cub200"](tmp_path))
    assert "Brewer_" in dataset[1]["file"]  # its captions say Brewers_
    assert dataset[1]["captions"] == captions(1)
    assert dataset.unmatched == []
    assert dataset[1]["attributes"] == {"species": 8}


def test_cub_reports_images_without_captions_and_odd_bytes(tmp_path, trees):
    trees["cub200"](tmp_path)
    texts = sorted((tmp_path / "cvpr2016_cub").rglob("*.txt"))
    texts[0].unlink()
    texts[1].write_bytes(b"a bird with a \xff\xfe beak\n")
    dataset = CUB200(tmp_path)
    assert len(dataset.unmatched) == 1
    texts = {record.captions for record in dataset.records}
    assert ("a bird with a �� beak",) in texts


def test_cub_splits(tmp_path, trees):
    trees["cub200"](tmp_path)
    home = tmp_path / "CUB_200_2011"
    write(home / "train_test_split.txt", "1 1\n2 0\n3 1\n4 0\n5 1\n6 0\n")
    assert len(CUB200(tmp_path, "test")) == 3
    files = [line.split()[1] for line in (home / "images.txt").read_text().splitlines()]
    names = [file.removesuffix(".jpg") for file in files[:2]]
    write(tmp_path / "birds/train/filenames.pickle", pickle.dumps(names, protocol=0))
    chosen = CUB200(tmp_path, "train", split_by="class")
    assert [record.file for record in chosen.records] == files[:2]
