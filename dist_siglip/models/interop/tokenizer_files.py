"""Tokenizer files with which another library cuts captions into the same tokens.

The whole way from caption to tokens becomes one ``tokenizer.json``: the cleaning that open_clip
does before its tokenizer, the tokenizer, and the tokens around it. What ``tokenizers`` has no
words for is left out: of what ftfy mends, mojibake, HTML entities, wide letters and ligatures.
"""

import json
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.text_tower import ModelTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words, but for the tokens around a caption.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# What ftfy removes: colours of terminals, control characters, byte order marks and their like.
_TERMINAL = r"\x1b\[[0-9;]*[a-zA-Z]"
_CONTROL = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"


def tokenizer_of(built: BuiltModel) -> ModelTokenizer:
    """Return the tokenizer of a model, loaded.

    Raises:
        TypeError: If the model was given a tokenizer that is none of ours.
    """
    if not isinstance(built.tokenizer, ModelTokenizer):
        raise TypeError(f"{type(built.tokenizer).__name__} is no ModelTokenizer")
    built.tokenizer.load()
    return built.tokenizer


def write_for_transformers(
    built: BuiltModel, folder: Path, *, names: list[str]
) -> dict[str, int | None]:
    """Write what ``AutoTokenizer`` reads.

    Returns:
        The ids of the special tokens, as a config of transformers names them.

    Raises:
        UserError: If an option of the tokenizer cannot be written down.
    """
    from transformers import PreTrainedTokenizerFast

    ours = tokenizer_of(built)
    inner = ours.loaded()
    if isinstance(inner, HFTokenizer) and not inner.tokenizer.is_fast:
        # Of SentencePiece: it has rules of its own, SiglipTokenizer those of SigLIP.
        _refuse_options(ours)
        inner.tokenizer.model_max_length = built.context_length
        inner.save_pretrained(folder)
        set_option(folder, "model_input_names", names)
        return _special_ids(inner.tokenizer)
    whole = whole_tokenizer(built)
    file = whole.to_str(pretty=True)
    special: dict[str, Any] = {"bos_token": START, "eos_token": END, "unk_token": END}
    if isinstance(inner, HFTokenizer):
        theirs = inner.tokenizer
        special = {
            kind: str(token)
            for kind, token in theirs.special_tokens_map.items()
            if isinstance(token, str)
        }
        special["padding_side"] = theirs.padding_side
    else:
        special["pad_token"] = inner.decoder[0]
    reads_names = isinstance(inner, HFTokenizer) and _cleaning(ours) != "canonicalize"
    if not reads_names:
        # A caption may hold their names: <|endoftext|>, or ! with which open_clip pads.
        special["split_special_tokens"] = True
    made = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        model_max_length=built.context_length,
        model_input_names=names,
        **special,
    )
    made.save_pretrained(folder)
    if not reads_names:
        # As saved, it lists the special tokens, and who reads the file alone would find them.
        (folder / "tokenizer.json").write_text(file, encoding="utf-8")
    if isinstance(inner, SimpleTokenizer) and _cleaning(ours) == "lower":
        whole.model.save(str(folder))  # vocab.json and merges.txt, for CLIPTokenizer
    # The class that takes tokenizer.json as it is, by the name all versions know.
    set_option(folder, "tokenizer_class", "PreTrainedTokenizerFast")
    return _special_ids(made)


def set_option(folder: Path, key: str, value: str | list[str] | bool) -> None:
    """Set a key of the tokenizer config in a folder."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[key] = value
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def whole_tokenizer(built: BuiltModel) -> "Tokenizer":
    """Return cleaning, tokenizer and the tokens around a caption as one; without padding.

    Raises:
        UserError: If an option of the tokenizer cannot be written down.
    """
    from tokenizers import Tokenizer

    ours = tokenizer_of(built)
    _refuse_options(ours)
    inner = ours.loaded()
    if isinstance(inner, SimpleTokenizer):
        made = _byte_pairs(inner)
    elif not inner.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {ours.name} is of SentencePiece and cannot become a tokenizer.json; "
            "use open_clip, hf or safetensors"
        )
    else:
        content = json.loads(inner.tokenizer.backend_tokenizer.to_str())
        if _cleaning(ours) == "canonicalize":
            content["added_tokens"] = _without_punctuation(content)
        made = Tokenizer.from_str(json.dumps(content))
        made.no_padding()
        made.no_truncation()
    _clean_first(made, _cleaning(ours))
    return made


def _without_punctuation(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that a caption without punctuation can hold, and those known nowhere else.

    Added tokens are found before cleaning, so <eos> in a caption would be one, where open_clip's
    cleaning leaves the word eos.
    """
    vocabulary = content["model"]["vocab"]  # a table, or a list of pairs with scores
    known = set(vocabulary) if isinstance(vocabulary, dict) else {pair[0] for pair in vocabulary}
    return [
        token
        for token in content["added_tokens"]
        if token["content"] not in known or not set(token["content"]) & set(string.punctuation)
    ]


def _cleaning(ours: ModelTokenizer) -> str:
    """Name open_clip's cleaning of captions; its two tokenizers have different defaults."""
    return str(ours.options.get("clean", "whitespace" if ours.hugging_face else "lower"))


def _refuse_options(ours: ModelTokenizer) -> None:
    """Refuse what changes tokens and has no place in a file."""
    options = {key: value for key, value in ours.options.items() if value}
    if ours.mode:
        options["tokenizer_mode"] = ours.mode
    for key in ("strip_sep_token", "reduction_mask", "additional_special_tokens", "tokenizer_mode"):
        if key in options:
            raise UserError(
                f"{key} ({options[key]}) of the tokenizer of {ours.name} cannot be written into "
                "tokenizer files; use open_clip or safetensors"
            )


def _byte_pairs(simple: SimpleTokenizer) -> "Tokenizer":
    """open_clip's own tokenizer, whose tokens around a caption get the names of CLIP."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    names = {simple.sot_token_id: START, simple.eot_token_id: END}
    made = Tokenizer(
        models.BPE(
            vocab={names.get(number, token): number for token, number in simple.encoder.items()},
            merges=sorted(simple.bpe_ranks, key=simple.bpe_ranks.get),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, simple.sot_token_id), (END, simple.eot_token_id)],
    )
    return made


def _clean_first(tokenizer: "Tokenizer", cleaning: str) -> None:
    """Put open_clip's cleaning of captions before the normalizer, unless it is there already."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [
        normalizers.Replace(Regex(_TERMINAL), ""),
        normalizers.Replace(Regex(_CONTROL), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
    ]
    if cleaning == "canonicalize":
        steps.append(normalizers.Replace("_", " "))
        steps.append(normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""))
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if cleaning in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    own = tokenizer.normalizer
    first = [json.loads(step.__getstate__()) for step in steps]
    present = [] if own is None else json.loads(own.__getstate__()).get("normalizers", [])
    if present[: len(first)] != first:
        tokenizer.normalizer = normalizers.Sequence(steps if own is None else [*steps, own])
