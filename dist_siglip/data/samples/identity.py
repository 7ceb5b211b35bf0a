"""Identity of pictures and captions: a number of 63 bits that is equal for what is the same.

A picture is its bytes, or what a field of its JSON says. A caption is its tokens: two texts that
the tokenizer makes equal, by cleaning or because it cuts both off, are one caption to the model,
and a text without a token is none.
"""

import hashlib
import html
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_siglip.data.samples.bad_samples import BadSampleError

# What ``picture_id`` of a data module says where no field of the JSON is named.
PICTURE_BYTES = "bytes"

Tokenizer = Callable[[list[str]], Tensor]


def picture_id(data: bytes) -> int:
    """Hash the bytes of an encoded picture to 63 bits, the same on every machine.

    Example:
        >>> picture_id(b"a"), picture_id(b"b")
        (4862746424704685054, 8424985511653054134)
    """
    return _to_63_bits(hashlib.sha1(data, usedforsecurity=False).digest())


def value_id(value: Any) -> int | None:
    """Hash what a field of a JSON says of the picture; None if it says nothing.

    Raises:
        BadSampleError: if it holds neither a text nor a whole number.

    Example:
        >>> value_id("391895") == value_id(391895), value_id(None), value_id("")
        (True, None, None)
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadSampleError(
            f"its picture id is a {type(value).__name__}, not a text or a whole number"
        )
    text = f"picture id {value}".encode("utf-8", "surrogatepass")
    return picture_id(text)


def caption_ids_of(tokenizer: object, texts: Sequence[str], tokens: Tensor) -> Tensor:
    """Hash captions by their tokens, padding included.

    A tokenizer that leaves out tokens by lot (its ``draws_tokens`` is True) gives a caption other
    tokens every time; there the cleaned text counts (its ``clean``).

    Args:
        tokenizer: that made the tokens.
        texts: B captions.
        tokens: (B, L) int64.

    Returns:
        (B,) int64 >= 0.

    Example:
        >>> caption_ids_of(None, ["a", "A", "b"], torch.tensor([[5], [5], [6]])).unique().numel()
        2
    """
    clean: Callable[[str], str] | None = None
    if getattr(tokenizer, "draws_tokens", False):
        clean = getattr(tokenizer, "clean", None)
    if clean is None:
        rows = [row.tobytes() for row in tokens.numpy()]
    else:
        rows = [clean(text).encode("utf-8", "surrogatepass") for text in texts]
    ids = [_to_63_bits(hashlib.blake2b(row, digest_size=8).digest()) for row in rows]
    return torch.tensor(ids, dtype=torch.int64)


class EmptyCaptions:
    """Tells texts without any token.

    Without a tokenizer, texts of nothing but white space and control characters, which no
    tokenizer keeps.

    Args:
        tokenizer: of the model; asked about texts without a letter or digit alone, since only
            those can be without a token.

    Example:
        >>> EmptyCaptions()("..."), EmptyCaptions()("&nbsp;"), EmptyCaptions()(chr(0))
        (False, True, True)
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> bool:
        """Whether the model sees an empty text."""
        shown = html.unescape(html.unescape(text)) if "&" in text else text
        if any(map(str.isalnum, shown)):
            return False
        if self._tokenizer is None:
            return all(map(_is_blank, shown))
        nothing, tokens = self._tokenizer(["", text])
        return torch.equal(nothing, tokens)


def _is_blank(letter: str) -> bool:
    return letter.isspace() or letter < " " or "\x7f" <= letter <= "\x9f" or letter == "\ufeff"


def _to_63_bits(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 1
