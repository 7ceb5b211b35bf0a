"""Text towers of Hugging Face, which open_clip wraps, and the tokenizer of any model.

A model config names a tower as ``hf_model_name``. As with open_clip, the weights that lie there are
taken unless weights of the whole dual encoder are; a config says ``hf_model_pretrained: false`` to
start at random. What open_clip leaves open is checked here: that every weight was found, that it is
a number, and that tokenizer and tower agree.

A tokenizer travels to loader processes: only its settings are pickled; each process loads the
tokenizer itself, once. The model's config decides which one: a Hugging Face tokenizer if it names
one, else open_clip's own byte-pair encoder, which needs no download.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from open_clip import SimpleTokenizer
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models.interop.transformers_format import CONFIG_NAME
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.system.regular_file import read_json

logger = logging.getLogger(__name__)

# The config of a text tower, beside the config of the dual encoder that has it.
# open_clip has a fourth, max_pooler, which cannot run: its mask is of numbers.
_POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
_PROJECTIONS = ("linear", "mlp", None)
# In a tokenizer config: tokenizer.json is all there is to it. transformers 5 makes a tokenizer of
# its own of the words in any folder of ``Siglip2Model``, whatever class the folder names.
WHOLE_TOKENIZER = "dist_siglip_whole_tokenizer"


def with_places(architecture: dict[str, Any], folder: Path, *, is_export: bool) -> dict[str, Any]:
    """Say in full where the text tower of a model config lies, and whose tokens it takes.

    A name that is no folder from here may be one in the folder of the config. A config without a
    tokenizer takes that of the text tower; open_clip would take its own, whose tokens mean nothing
    to the tower.

    Args:
        architecture: open_clip's model config; not changed.
        folder: where the config lies.
        is_export: whether a ``config.json`` beside it is that of the text tower.
    """
    text = architecture["text_cfg"]
    if not isinstance(text, dict) or not text.get("hf_model_name"):
        return architecture
    architecture = deepcopy(architecture)
    text = architecture["text_cfg"]
    text["hf_tokenizer_name"] = text.get("hf_tokenizer_name") or text["hf_model_name"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        beside = folder / str(text[key])
        if not Path(str(text[key])).is_dir() and beside.is_dir():
            text[key] = str(beside)
    if is_export and _is_text_config(folder / CONFIG_NAME):
        text["hf_model_name"] = str(folder)
    return architecture


def is_whole_tokenizer(folder: Path) -> bool:
    """Whether a folder says that its tokenizer.json is the whole tokenizer."""
    try:
        said = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError, RecursionError):
        return False  # whoever loads the tokenizer says what is wrong
    return isinstance(said, dict) and bool(said.get(WHOLE_TOKENIZER))


def load_whole_tokenizer(folder: Path) -> Any:
    """Load what tokenizer.json holds, whatever kind of model lies beside it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def wants_weights(text_config: dict[str, Any]) -> bool:
    """Whether a ``text_cfg`` asks for the weights of its Hugging Face tower."""
    return bool(text_config.get("hf_model_name")) and text_config.get("hf_model_pretrained", True)


def check_text_config(architecture: dict[str, Any], name: str) -> None:
    """Refuse what open_clip would fail at later, or in other words.

    Args:
        architecture: model config whose ``text_cfg`` has ``hf_model_name``.
        name: how the user named the model, for error texts.

    Raises:
        UserError: If transformers is missing, the config of the tower cannot be had, or open_clip
            has no such pooling, projection or kind of tower.
    """
    text_config = architecture["text_cfg"]
    if not importlib.util.find_spec("transformers"):
        raise UserError(
            f"model {name} has a Hugging Face text tower, which needs transformers; "
            'run: pip install "dist-siglip[hf]"'
        )
    for key, allowed, default in (
        ("hf_pooler_type", _POOLERS, "mean_pooler"),
        ("hf_proj_type", _PROJECTIONS, "mlp"),
    ):
        value = text_config.get(key, default)
        if value not in allowed:
            names = ", ".join("null" if each is None else each for each in allowed)
            raise UserError(f"{key} ({value}) of model {name} must be one of {names}")
    from transformers import AutoConfig

    tower = text_config["hf_model_name"]
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(tower, name, error) from error
    kind = config.model_type
    if kind not in arch_dict:
        raise UserError(
            f"hf_model_name ({tower}) of model {name} is a {kind}; open_clip has text towers of "
            f"{', '.join(arch_dict)}"
        )
    if getattr(config, "pad_token_id", None) is None:
        raise UserError(
            f"hf_model_name ({tower}) of model {name} has no pad_token_id in its config.json, "
            "without which open_clip cannot tell text from padding; add it"
        )
    width = getattr(config, arch_dict[kind]["config_names"]["width"])
    if text_config.get("hf_proj_type", "mlp") is None and width != architecture["embed_dim"]:
        raise UserError(
            f"hf_proj_type (null) of model {name} needs embed_dim ({architecture['embed_dim']}) to "
            f"be the width of the text tower, {width}; use linear or mlp"
        )


def load_text_tower(network: nn.Module, text_config: dict[str, Any], name: str) -> None:
    """Put the weights that lie at ``hf_model_name`` into the text tower, as open_clip does.

    Args:
        network: ``open_clip.CustomTextCLIP`` with such a tower; changed: in fp32, in training mode.
        text_config: its ``text_cfg``.
        name: how the user named the model, for error texts.

    Raises:
        UserError: If there are none, a weight that the tower uses is missing or of another shape,
            or an entry is not finite.
    """
    from transformers import AutoModel

    text: Any = network.text
    tower = text_config["hf_model_name"]
    is_part = bool(getattr(text.config, "is_encoder_decoder", False))
    pooling = text_config.get("hf_pooler_type", "mean_pooler") == "cls_pooler"
    options: dict[str, Any] = {} if is_part else {"add_pooling_layer": pooling}
    try:
        with quiet_transformers():
            loaded, report = AutoModel.from_pretrained(tower, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _not_loaded(tower, name, error) from error
    encoder: nn.Module = loaded.encoder if is_part else loaded
    used = {("encoder." if is_part else "") + key for key in encoder.state_dict()}
    missing = sorted(used.intersection(report["missing_keys"]))
    if missing:
        raise UserError(
            f"hf_model_name ({tower}) of model {name} lacks {len(missing)} weights of its tower "
            f"({', '.join(missing[:3])}); name a folder or repository that has them, another "
            "hf_pooler_type, or start at random with hf_model_pretrained: false"
        )
    refuse_not_finite(encoder.state_dict(), f"hf_model_name ({tower})")
    text.transformer = encoder.float().train()
    logger.info("text tower: weights of %s", tower)


def check_tokens(network: Any, tokenizer: Any, context_length: int, name: str) -> None:
    """Refuse tokens that a Hugging Face text tower cannot take; warn where it reads padding.

    Raises:
        UserError: If a token or a position is beyond the tower's tables, or the tokenizer cannot
            pad.
    """
    config = network.text.config
    theirs = tokenizer.tokenizer if isinstance(tokenizer, HFTokenizer) else tokenizer
    num_tokens = len(theirs) if isinstance(tokenizer, HFTokenizer) else theirs.vocab_size
    if num_tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer of model {name} has {num_tokens} tokens, its text tower "
            f"{config.vocab_size}; set hf_tokenizer_name to the tokenizer of hf_model_name"
        )
    most = getattr(config, "max_position_embeddings", 0)
    if "roberta" in config.model_type:  # its positions begin behind the one of padding
        most -= config.pad_token_id + 1
    if most and context_length > most:
        raise UserError(
            f"context_length ({context_length}) of model {name} must be at most {most}, the "
            "positions of its text tower"
        )
    if not isinstance(tokenizer, HFTokenizer):
        return
    if theirs.pad_token_id is None:
        raise UserError(f"the tokenizer of model {name} has no pad token; name one that has")
    if theirs.pad_token_id != config.pad_token_id:
        logger.warning(
            "the tokenizer of model %s pads with %d, its text tower leaves out %d and reads "
            "padding as text; set hf_tokenizer_name to the tokenizer of hf_model_name",
            name,
            theirs.pad_token_id,
            config.pad_token_id,
        )


def encode_with_tokens(text: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode (B, L) token ids with a Hugging Face tower: features (B, D), tokens, which are text.

    Returns:
        Features, not normalised; output of the last block (B, L, C); (B, L) bool, True where the
        tower looked.
    """
    is_token = ids != text.config.pad_token_id
    mask = is_token.long()
    out = text.transformer(input_ids=ids, attention_mask=mask)
    return text.proj(text.pooler(out, mask)), out.last_hidden_state, is_token


def recompute_blocks(text: Any) -> None:
    """Let a Hugging Face tower compute its blocks again in backward, to save memory.

    open_clip asks for it by a name that transformers 5 warns about.
    """
    tower = text.transformer
    tower.config.use_cache = False  # of no use to an encoder, and warned about
    newest = getattr(tower, "activation_checkpointing_enable", None)
    (newest or tower.gradient_checkpointing_enable)({"use_reentrant": False})


def describe_config(text: Any) -> dict[str, Any]:
    """The config of a Hugging Face tower, without what does not change its features."""
    left_out = (
        *("_name_or_path", "transformers_version", "architectures"),
        *("dtype", "torch_dtype", "use_cache"),
    )
    config: dict[str, Any] = text.config.to_dict()
    return {key: value for key, value in config.items() if key not in left_out}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and reports of transformers off the screen."""
    from transformers.utils import logging as messages

    was_enabled, level = messages.is_progress_bar_enabled(), messages.get_verbosity()
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if was_enabled:
            messages.enable_progress_bar()


def _is_text_config(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") in arch_dict
    except (OSError, ValueError, AttributeError):
        return False


def _not_loaded(tower: str, name: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"hf_model_name ({tower}) of model {name} cannot be loaded ({text}); check the name and "
        "the network, or name a folder that holds config.json and weights"
    )


class ModelTokenizer:
    """Turn captions into the token rows a text tower expects.

    Args:
        name: how the user named the model, for error texts.
        text_config: ``text_cfg`` of the model config.
        context_length: number of tokens in a row; longer captions are cut, shorter ones padded.
        folder: folder that holds the Hugging Face tokenizer; None for the one the config names.
    """

    def __init__(
        self,
        *,
        name: str,
        text_config: dict[str, Any],
        context_length: int,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.context_length = context_length
        self.vocab_size: int | None = text_config.get("vocab_size")
        self.has_open_clip_tower = not text_config.get("hf_model_name")
        self.options: dict[str, Any] = dict(text_config.get("tokenizer_kwargs") or {})
        self.mode: str | None = text_config.get("tokenizer_mode")
        named: str | None = text_config.get("hf_tokenizer_name") or None
        self.hugging_face = str(folder) if named and folder is not None else named
        self._loaded: Any = None

    def load(self) -> None:
        """Load the tokenizer into this process, if that has not happened yet.

        Raises:
            UserError: If transformers or the tokenizer files are missing, if an option is wrong or
                would allow foreign code, or if the tokenizer has more tokens than the text tower.
        """
        if self._loaded is None:
            self._loaded = self._load_hugging_face() if self.hugging_face else self._load_simple()

    def loaded(self) -> SimpleTokenizer | HFTokenizer:
        """Return open_clip's own object, loaded if need be; see ``load``."""
        self.load()
        return self._loaded

    @property
    def draws_tokens(self) -> bool:
        """Whether a long caption loses tokens by lot, others every time."""
        return self.options.get("reduction_mask") in ("simple", "random", "shuffle")

    def makes_tokens_of(self, other: object) -> bool:
        """Whether it turns every caption into the same row of tokens as another tokenizer."""
        if not isinstance(other, ModelTokenizer) or self.draws_tokens:
            return False
        names = ("context_length", "options", "mode", "hugging_face")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def clean(self, text: str) -> str:
        """Clean a caption as is done before it is cut into tokens."""
        self.load()
        return str(self._loaded.clean_fn(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without those that stand for no text."""
        tokenizer = self.loaded()
        if isinstance(tokenizer, HFTokenizer):
            return str(tokenizer.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
        special = set(tokenizer.all_special_ids)
        known = [each for each in tokens if each in tokenizer.decoder and each not in special]
        return str(tokenizer.decode(known)).strip()

    def __call__(self, texts: list[str]) -> Tensor:
        """Return token ids (len(texts), context_length), int64."""
        self.load()
        tokens: Tensor = self._loaded(texts)
        return tokens

    def _load_simple(self) -> Any:
        try:
            tokenizer = SimpleTokenizer(context_length=self.context_length, **self.options)
        except (AssertionError, OSError, TypeError) as error:
            raise UserError(
                f"tokenizer_kwargs ({self.options}) of model {self.name} are wrong: {error}"
            ) from error
        vocab_size = 49408 if self.vocab_size is None else self.vocab_size
        if self.has_open_clip_tower and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"vocab_size ({vocab_size}) of model {self.name} must be at least "
                f"{tokenizer.vocab_size}, the number of tokens its tokenizer can produce"
            )
        return tokenizer

    def _load_hugging_face(self) -> Any:
        if "trust_remote_code" in self.options:
            raise UserError(
                f"tokenizer_kwargs of model {self.name} set trust_remote_code, which would run "
                "code of the tokenizer's author; remove it from the config"
            )
        try:
            made = HFTokenizer(
                self.hugging_face,
                context_length=self.context_length,
                tokenizer_mode=self.mode,
                trust_remote_code=False,
                **self.options,
            )
            if is_whole_tokenizer(Path(str(self.hugging_face))):
                made.tokenizer = load_whole_tokenizer(Path(str(self.hugging_face)))
        except ImportError as error:
            raise UserError(
                f"model {self.name} needs the Hugging Face tokenizer {self.hugging_face} "
                f'({error}); run: pip install "dist-siglip[hf]"'
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer {self.hugging_face} of model {self.name} cannot be loaded "
                f"({' '.join(str(error).split())[:200]}); check its files or the network"
            ) from error
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}
