"""Language-guided codebooks (LG-VQ, NeurIPS 2024) for any VQ image tokenizer."""

__version__ = "0.1.0"
