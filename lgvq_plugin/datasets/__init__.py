"""Captioned images. `target:` in the config names a data set by its short name or dotted path.

`lgvq data check` tries them in this order: published data sets first, then the general layouts,
from the most specific to the least.
"""

MEMBERS = {
    "textcaps": "textcaps.TextCaps",
    "celeba_hq": "celeba_hq.CelebAHQ",
    "cub200": "cub200.CUB200",
    "cocoqa": "cocoqa.CocoQA",
    "vqa2": "vqa2.VQA2",
    "coco": "coco.Coco",
    "webdataset": "webdataset.WebDataset",
    "huggingface": "huggingface.HuggingFaceImages",
    "pairs_table": "tables.PairsTable",
    "list_file": "tables.ListFile",
    "folder": "folder.CaptionedFolder",
    "scenes": "scenes.Scenes",
}
