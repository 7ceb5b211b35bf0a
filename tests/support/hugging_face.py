"""Small folders of transformers: true classes, random weights, made without a network."""

import json
from pathlib import Path

import torch

SENTENCES = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**TOWER, "vocab_size": 128, "max_position_embeddings": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer trained on a few words, which ends each text in its last token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def write_folder(folder: Path, kind: str, *, end: int = 2, **options: object) -> torch.nn.Module:
    """Save a small model of transformers with tokenizer and preprocessing, and return it."""
    import transformers as hf

    image = {**TOWER, "patch_size": 8}
    text = {**TEXT, **SPECIAL, "eos_token_id": end}
    if kind == "siglip":
        config = hf.SiglipConfig(text_config=text, vision_config={**image, "image_size": 32})
        model = hf.SiglipModel(config)
    elif kind == "siglip2":
        config = hf.Siglip2Config(text_config=text, vision_config={**image, "num_patches": 16})
        model = hf.Siglip2Model(config)
    else:
        config = hf.CLIPConfig(
            text_config=text, vision_config={**image, "image_size": 32}, projection_dim=24
        )
        model = hf.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.logit_scale.data.fill_(3.0)
    if hasattr(model, "logit_bias"):
        model.logit_bias.data.fill_(-11.5)
    model.eval().save_pretrained(folder, **options)
    write_tokenizer(folder)
    preprocessing = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model
