"""Frozen text models that guide the codebook; `guide: {use: NAME, ...}` in the config."""

MEMBERS = {
    "open_clip": "open_clip.OpenCLIPGuide",
    "micro_clip": "micro_clip.MicroCLIPGuide",
    "huggingface": "huggingface.HuggingFaceGuide",
    "cached": "cached.CachedGuide",
    "bag_of_words": "bag_of_words.BagOfWords",
}
