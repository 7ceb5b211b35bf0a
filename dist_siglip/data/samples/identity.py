"""The identity of captions and pictures: a number of 63 bits.

That of a picture is made of its bytes, or of what a field of its JSON says. That of a caption is
made of its tokens: two texts that the tokenizer makes equal are one caption to the model, and a
text without a token is none.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import MissingFieldError, field_of, read_json

# What ``picture_id`` of a data module says where no field of the JSON is named.
PICTURE_BYTES = "bytes"


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


def named_picture_id(data: bytes, field: str) -> int | None:
    """Return the id that a field of a JSON member gives a picture; None if it gives none.

    Raises:
        BadSampleError: if the JSON cannot be read, or the field holds neither text nor number.

    Example:
        >>> named_picture_id(b'{"coco": {"id": 7}}', "coco.id") == value_id(7)
        True
    """
    try:
        return value_id(field_of(read_json(data), field))
    except MissingFieldError:
        return None


def caption_id(text: str) -> int:
    """Hash a text to 63 bits, the same on every machine and in every process.

    Equal ids mean equal texts, up to leading and trailing white space. To a model captions are the
    same if their tokens are: where a tokenizer is at hand, batches and metrics go by
    ``identity.caption_ids_of``. Among a million different texts the chance of any clash is 5e-8.

    Args:
        text: the caption; white space at both ends does not count.

    Returns:
        An integer in [0, 2**63), which fits an int64 tensor.

    Example:
        >>> caption_id("a red fox") == caption_id(" a red fox ")
        True
        >>> caption_id("a red fox")
        2024877603437203571
    """
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _to_63_bits(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 1
