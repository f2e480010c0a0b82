"""Frozen models that guide the codebook: `guide: {use: NAME, ...}` in the config for text, and
`guides: {vision: {use: NAME, ...}}` for images.
"""

MEMBERS = {
    "open_clip": "open_clip.OpenCLIPGuide",
    "micro_clip": "micro_clip.MicroCLIPGuide",
    "huggingface": "huggingface.HuggingFaceGuide",
    "cached": "cached.CachedGuide",
    "bag_of_words": "bag_of_words.BagOfWords",
    "open_clip_vision": "open_clip.OpenCLIPVision",
    "timm": "timm.TimmGuide",
    "torchvision": "torchvision.TorchvisionGuide",
    "huggingface_vision": "huggingface.HuggingFaceVision",
}
