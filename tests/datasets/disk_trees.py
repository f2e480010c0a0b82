"""Miniature trees with the names, nesting, fields and quirks of the published data sets.

Every tree holds COUNT training images, each with eight captions, so that one contract test can
drive all members; what is peculiar to one set is tested in its own file.
"""

import csv
import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

COUNT = 6
COCO_IDS = (9, 25, 30, 34, 36, 123456)  # short ids: the file names have twelve digits
SPECIES = ("001.Black_footed_Albatross", "009.Brewer_Blackbird")


def captions(k):
    return [f"caption {c} of {k}" for c in range(8)]


def photo(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20 + k), (40 * k, 0, 0)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def coco(root, year=2017, part="train", numbers=COCO_IDS):
    prefix = f"COCO_{part}{year}_" if year == 2014 else ""
    names = {number: f"{prefix}{number:012d}.jpg" for number in numbers}
    for k, name in enumerate(names.values()):
        photo(root / f"{part}{year}" / name, k)
    images = [
        {"license": 4, "file_name": name, "height": 20, "width": 30, "id": number}
        for number, name in names.items()
    ]
    # COCO lists annotations by their own ids, so those of an image do not stand together.
    notes = [
        {"image_id": number, "id": 10 * c + k, "caption": f" {captions(k)[c]}\n"}
        for c in range(8)
        for k, number in enumerate(numbers)
    ]
    content = {"info": {"year": year}, "licenses": [], "images": images, "annotations": notes}
    write(root / f"annotations/captions_{part}{year}.json", content)
    return {"root": root, "split": "train" if part == "train" else "validation"}


def textcaps(root):
    rows = []
    for k in range(COUNT):
        name = f"{k:015x}f"
        photo(root / f"train_images/{name}.jpg", k)
        rows += [
            {
                "image_id": name,
                "image_path": f"train/{name}.jpg",
                "set_name": "train",
                "caption_id": 8 * k + c,
                "caption_str": captions(k)[c],
                "reference_strs": [f"{text} " for text in captions(k)],
            }
            for c in range(8)
        ]
    content = {"dataset_name": "textcaps", "dataset_type": "train", "data": rows}
    write(root / "TextCaps_0.1_train.json", content)
    return {"root": root}


def celeba_hq(root):
    for k in range(COUNT):
        photo(root / f"image/{k * 17}.jpg", k)
        write(root / f"text/{k * 17}.txt", "\r\n".join(captions(k)).encode())
    names = [str(k * 17) for k in range(COUNT)]
    write(root / "train/filenames.pickle", pickle.dumps(names, protocol=2))
    return {"root": root}


def cub200(root):
    home, lines = root / "CUB_200_2011", {"images": "", "split": "", "labels": ""}
    for k in range(COUNT):
        species = SPECIES[k % 2]
        file = f"{species}/{species[4:]}_{k:04d}_{796000 + k}.jpg"
        photo(home / "images" / file, k)
        texts = file.replace("Brewer_", "Brewers_").replace(".jpg", ".txt")
        write(root / "cvpr2016_cub/text_c10" / texts, "\n".join(captions(k)))
        lines["images"] += f"{k + 1} {file}\n"
        lines["split"] += f"{k + 1} 1\n"
        lines["labels"] += f"{k + 1} {1 if k % 2 == 0 else 9}\n"
    write(home / "images.txt", lines["images"])
    write(home / "train_test_split.txt", lines["split"])
    write(home / "image_class_labels.txt", lines["labels"])
    write(home / "classes.txt", "".join(f"{int(name[:3])} {name}\n" for name in SPECIES))
    return {"root": root}


def cocoqa(root):
    coco(root, year=2014)
    columns = {
        "questions": ["what is on the bed ?", "what is the color of the cat ?"] * COUNT,
        "answers": ["cat", "black"] * COUNT,
        "types": ["0", "2"] * COUNT,
        "img_ids": [str(number) for number in COCO_IDS for _ in range(2)],
    }
    for name, values in columns.items():
        write(root / f"cocoqa/train/{name}.txt", "\n".join(values) + "\n")
    return {"root": root}


def vqa2(root):
    coco(root, year=2014)
    questions, notes = [], []
    for number in COCO_IDS:
        key = number * 1000
        questions.append({"image_id": number, "question": "Is it red?", "question_id": key})
        answers = [
            {"answer": "yes" if i < 7 else "no", "answer_confidence": "maybe", "answer_id": i + 1}
            for i in range(10)
        ]
        notes.append(
            {
                "question_id": key,
                "image_id": number,
                "question_type": "is it",
                "answer_type": "yes/no",
                "multiple_choice_answer": "yes",
                "answers": answers,
            }
        )
    write(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    write(root / "v2_mscoco_train2014_annotations.json", {"annotations": notes})
    return {"root": root}


def encoded(k):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20 + k), (40 * k, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def webdataset(root):
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"shard_{shard:06d}.tar", "w") as tar:
            for k in range(3 * shard, 3 * shard + 3):
                members = {"jpg": encoded(k), "txt": "\n".join(captions(k)).encode()}
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{k:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {"root": root}


def huggingface(root):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {
        "image": [{"bytes": encoded(k), "path": None} for k in range(COUNT)],
        "captions": [captions(k) for k in range(COUNT)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(root))
    return {"root": root}


def pairs_table(root):
    root.mkdir(parents=True, exist_ok=True)
    with (root / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for k in range(COUNT):
            photo(root / f"images/{k}.png", k)
            rows.writerows([f"images/{k}.png", text] for text in captions(k))
    return {"root": root, "split": "train"}


def list_file(root):
    for k in range(COUNT):
        photo(root / f"pictures/{k}.jpg", k)
        write(root / f"pictures/{k}.txt", "\n".join(captions(k)))
    write(root / "train.txt", "".join(f"{root}/pictures/{k}.jpg\r\n" for k in range(COUNT)))
    return {"root": root / "train.txt"}


def folder(root):
    for k in range(COUNT):
        photo(root / f"{k}.png", k)
        write(root / f"{k}.txt", "\n".join(captions(k)))
    return {"root": root}


TREES = {
    make.__name__: make
    for make in (
        textcaps, celeba_hq, cub200, cocoqa, vqa2, coco, webdataset, huggingface, pairs_table,
        list_file, folder,
    )
}  # fmt: skip
