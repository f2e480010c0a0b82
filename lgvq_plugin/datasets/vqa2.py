"""VQA v2 on COCO images: open questions with ten human answers each.

root/v2_OpenEnded_mscoco_{train,val}2014_questions.json  v2_mscoco_{train,val}2014_annotations.json
root/v2_OpenEnded_mscoco_test2015_questions.json         images: COCO's folders, at `images`
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .coco import CocoImages, all_captions, annotation_file, entries, read_json
from .listed import ListedImages, Reading, Record, choose_split

PARTS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
PLACES = (".", "questions", "annotations", "vqa", "VQAv2")


class VQA2(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "answers", "type", ...}`.

    `answer` is the official most frequent one, `answers` all ten (the accuracy of VQA needs
    them), `type` yes/no, number or other, `question_id` what a result file names. The test
    split has questions only. Captions come from COCO's captions files where they lie beside the
    images, else `caption == ""`.

    Args:
        root: the folder with the question files.
        split: train, validation or test.
        images: COCO's folder; null looks in root and in the folder above.
        drop_missing: leave out questions about images that are not there.
        options: see `Reading`.

    Raises:
        ConfigError: if a file or an image is missing, or a question has no annotation.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        images: str | Path | None = None,
        drop_missing: bool = False,
        **options: Any,
    ):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        split = choose_split(split, list(PARTS))
        path = _file(root, f"v2_OpenEnded_mscoco_{PARTS[split]}_questions.json")
        if path is None:
            raise ConfigError(f"{root}: no v2_OpenEnded_mscoco_{PARTS[split]}_questions.json")
        homes = [Path(images).expanduser()] if images else [root, root.parent]
        files = CocoImages(*homes)
        captions = {k: v for home in homes for k, v in all_captions(home, home).items()}
        records = []
        for number, asked in _questions(root, path, split).items():
            where = files.find(number=number)
            extra = {"image_id": number, "questions": asked}
            records.append(Record(where.name, where, tuple(captions.get(number, ())), extra))
        if drop_missing:
            records = [record for record in records if record.path.is_file()]
        super().__init__(records, reading, where=path)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for v2_OpenEnded_mscoco_*_questions.json."""
        return {
            split: {"root": root, "split": split}
            for split, part in PARTS.items()
            if _file(root, f"v2_OpenEnded_mscoco_{part}_questions.json")
        }


def _file(root: Path, name: str) -> Path | None:
    found = (annotation_file(root / place, name) for place in PLACES)
    return next((path for path in found if path), None)


def _questions(root: Path, path: Path, split: str) -> dict[int, list[dict[str, Any]]]:
    answers = {} if split == "test" else _answers(root, PARTS[split])
    found: dict[int, list[dict[str, Any]]] = {}
    needed = ("image_id", "question", "question_id")
    for entry in entries(read_json(path), "questions", needed, path, numbers=needed[::2]):
        number = entry["question_id"]
        if split != "test" and number not in answers:
            raise ConfigError(f"{path}: question {number} has no answers in the annotations")
        asked = {
            "question": " ".join(entry["question"].split()),
            "question_id": number,
            **answers.get(number, {}),
        }
        found.setdefault(int(entry["image_id"]), []).append(asked)
    return found


def _answers(root: Path, part: str) -> dict[int, dict[str, Any]]:
    path = _file(root, f"v2_mscoco_{part}_annotations.json")
    if path is None:
        raise ConfigError(f"{root}: no v2_mscoco_{part}_annotations.json for the questions there")
    needed = ("question_id", "multiple_choice_answer", "answers")
    return {
        entry["question_id"]: {
            "answer": entry["multiple_choice_answer"],
            "answers": [given["answer"] for given in entry["answers"]],
            "type": entry.get("answer_type", ""),
        }
        for entry in entries(read_json(path), "annotations", needed, path)
    }
