"""A tiny encoder of transformers with random weights, in a folder."""

import string
from pathlib import Path

import pytest
import torch


def save_bert(folder: Path, *, mask_token: bool = True) -> Path:
    """Write a BERT of two layers and its WordPiece tokenizer of letters and a few words."""
    transformers = pytest.importorskip("transformers", reason="extra [hf] is not installed")
    from tokenizers import BertWordPieceTokenizer

    words = ["a", "red", "circle", "above", "blue", "green", "square", "checker", "##board", "is"]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    pieces = list(dict.fromkeys([*pieces, *(f"##{letter}" for letter in letters)]))
    backend = BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]"} | ({"mask_token": "[MASK]"} if mask_token else {})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, model_max_length=64, **special
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(pieces),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.3,
            )
        )
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def bert_without_mask(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert_without_mask"), mask_token=False)
