"""VQA v2 on COCO images: open questions with ten human answers each.

root/v2_OpenEnded_mscoco_{train,val}2014_questions.json  v2_mscoco_{train,val}2014_annotations.json
root/v2_OpenEnded_mscoco_test2015_questions.json         images: COCO's folders, at `images`
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .coco import annotation_file, entries, question_records, read_json
from .listed import ListedImages, Record
from .splits import choose_split, splits_at

PARTS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


class VQA2(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "answers", "type", ...}`.

    `answer` is the official most frequent one, `answers` all ten (the accuracy of VQA needs
    them), `type` yes/no, number or other, `question_id` the id in a result file. The test
    split has questions only. Captions come from COCO's captions files where these are beside
    the images, else `caption == ""`.

    Args:
        root: the folder with the question files.
        split: train, validation or test.
        images: COCO's folder; null looks in root and in the folder above.
        drop_missing: leave out questions about images that do not exist.
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self,
        root: Path,
        split: str = "train",
        *,
        images: str | Path | None = None,
        drop_missing: bool = False,
    ) -> list[Record]:
        part = PARTS[choose_split(split, PARTS)]
        self.where = _file(root, QUESTIONS, part)
        places = [Path(images).expanduser()] if images else [root, root.parent]
        answers = None if part == PARTS["test"] else _answers(_file(root, ANNOTATIONS, part))
        records = question_records(_questions(self.where, answers), places)
        return [r for r in records if r.path.is_file()] if drop_missing else records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for v2_OpenEnded_mscoco_*_questions.json."""
        return splits_at(root, (s for s, part in PARTS.items() if _find(root, QUESTIONS, part)))


def _find(root: Path, name: str, part: str) -> Path | None:
    folders = (".", "questions", "annotations", "vqa", "VQAv2")
    found = (annotation_file(root / folder, name.format(part)) for folder in folders)
    return next((path for path in found if path), None)


def _file(root: Path, name: str, part: str) -> Path:
    if (path := _find(root, name, part)) is None:
        raise ConfigError(f"{root}: no {name.format(part)}")
    return path


def _questions(
    path: Path, answers: dict[int, dict[str, Any]] | None
) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    needed = ("image_id", "question", "question_id")
    for entry in entries(read_json(path), "questions", needed, path, numbers=needed[::2]):
        number = entry["question_id"]
        if answers is not None and number not in answers:
            raise ConfigError(f"{path}: question {number} has no answers in the annotations")
        asked = {"question": " ".join(entry["question"].split()), "question_id": number}
        asked |= (answers or {}).get(number, {})
        found.setdefault(int(entry["image_id"]), []).append(asked)
    return found


def _answers(path: Path) -> dict[int, dict[str, Any]]:
    needed = ("question_id", "multiple_choice_answer", "answers")
    return {
        entry["question_id"]: {
            "answer": entry["multiple_choice_answer"],
            "answers": [given["answer"] for given in entry["answers"]],
            "type": entry.get("answer_type", ""),
        }
        for entry in entries(read_json(path), "annotations", needed, path)
    }
