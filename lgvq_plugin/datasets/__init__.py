"""Captioned images. `target:` in the config names a data set by its short name or dotted path.

`lgvq data check` tries them in this order: published data sets first, then the general layouts,
from the most specific to the least.
"""

MEMBERS = {
    "textcaps": "pickled.TextCaps",
    "celeba_hq": "pickled.CelebAHQ",
    "cub200": "pickled.CUB200",
    "cocoqa": "coco.CocoQA",
    "vqa2": "coco.VQA2",
    "coco": "coco.Coco",
    "webdataset": "webdataset.WebDataset",
    "huggingface": "huggingface.HuggingFaceImages",
    "pairs_table": "folder.PairsTable",
    "list_file": "folder.ListFile",
    "folder": "folder.CaptionedFolder",
    "scenes": "scenes.Scenes",
}
