"""The tokenizer of a model, as a small value that travels to loader processes.

Only its settings are pickled; each process loads the tokenizer itself, once. The model's config
decides which one: a Hugging Face tokenizer if it names one, else open_clip's own byte-pair
encoder, which needs no download.
"""

from pathlib import Path
from typing import Any

from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from dist_siglip.errors import UserError


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

    def clean(self, text: str) -> str:
        """Clean a caption as is done before it is cut into tokens."""
        self.load()
        return str(self._loaded.clean_fn(text))

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
            return HFTokenizer(
                self.hugging_face,
                context_length=self.context_length,
                tokenizer_mode=self.mode,
                trust_remote_code=False,
                **self.options,
            )
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}
