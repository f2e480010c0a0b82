"""Tokenizers and their adapters; `model: {target: ...}` takes any dotted path."""

MEMBERS = {
    "repository": "repository.build",
    "sonnet_vqvae": "sonnet_vqvae.SonnetVQVAE",
    "vqvae": "vqvae.VQVAE",
}
