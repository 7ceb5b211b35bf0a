"""Small text towers of Hugging Face, and model configs that name them; made without a network."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import VIT

WORDS = ["a", "one", "two", "three", "four", "five", "six", "red", "fox", "boat", "and", "the"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def write_bert(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a small BERT with random weights, without pooling layer, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    settings = {**SIZES, "vocab_size": len(vocab), "pad_token_id": 0, **config}
    model = BertModel(BertConfig(**settings), add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def architecture_with(tower: Path | str, embed_dim: int = 8, **text: Any) -> dict[str, Any]:
    """A model config with that text tower, behind a linear projection unless said otherwise."""
    settings = {"hf_model_name": str(tower), "hf_proj_type": "linear", "context_length": 10, **text}
    return {"embed_dim": embed_dim, "vision_cfg": VIT, "text_cfg": settings}


def write_architecture(path: Path, tower: Path | str, **options: Any) -> str:
    """Write such a config, and return its path as ``model`` takes it."""
    path.write_text(json.dumps(architecture_with(tower, **options)))
    return str(path)
