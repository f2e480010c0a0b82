"""Tokenizers and their adapters; `model: {target: ...}` takes any dotted path."""

MEMBERS = {
    "vqvae": "vqvae.VQVAE",
}
