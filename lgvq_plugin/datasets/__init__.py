"""Captioned images; `target:` in the config names one by dotted path, or a member's name."""

MEMBERS = {
    "folder": "folder.CaptionedFolder",
    "scenes": "scenes.Scenes",
}
