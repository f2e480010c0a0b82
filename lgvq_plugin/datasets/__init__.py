"""Captioned images; `target:` in the config names one by dotted path, or a member's name.

The order is the order in which `lgvq data check` asks them whether a path is theirs: published
data sets first, then the general layouts, from the most telling to the least.
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
    "pairs_table": "pairs_table.PairsTable",
    "list_file": "list_file.ListFile",
    "folder": "folder.CaptionedFolder",
    "scenes": "scenes.Scenes",
}
