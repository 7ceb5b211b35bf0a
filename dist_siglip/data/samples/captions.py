"""Captions of a sample, and the identity of captions and pictures.

A sample may offer several captions: in several members, lines of one, or entries of a list inside
its JSON. A ``CaptionRule`` says which are meant and which one a position in the stream gets.

An identity is a number of 63 bits. That of a picture is made of its bytes, or of what a field of
its JSON says. That of a caption is made of its tokens: two texts that the tokenizer makes equal are
one caption to the model, and a text without a token is none.
"""

import hashlib
import html
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dist_siglip.data.order.sequence import draw_one
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.errors import UserError

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


MAX_CAPTION_BYTES = 1 << 20
MAX_CAPTION_CHARACTERS = 4096
# Parts the draw of a caption from the draws of substitutes, whose keys end in the attempt.
_CAPTION_DRAW = 1 << 20
EMPTY_CAPTION = "caption is empty"


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """Where the captions of a sample are, and which one is taken.

    Args:
        members: extensions of the members that hold captions, in order of preference; a sample
            needs one of them. Of a ``json`` member ``json_field`` counts, others are text.
        json_field: name of the field that holds a caption or a list of them; "a.b" is field b of
            the object in field a, or of each object of the list there ("sentences.raw" in the
            annotations of Karpathy).
        pick: "first" takes the first caption that is not empty; "random" draws one of all, a
            function of the place in the stream: another in the next epoch, the same when a run
            resumes. Evaluations always take the first.
        split_lines: whether each line of a text member is a caption of its own.
    """

    members: tuple[str, ...] = ("txt",)
    json_field: str = "caption"
    pick: Literal["first", "random"] = "first"
    split_lines: bool = False

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: if no member is named, or the rule is neither "first" nor "random".
        """
        if not self.members or not all(self.members):
            raise UserError(f'captions.members ({list(self.members)}) must name one, e.g. ["txt"]')
        if self.pick not in ("first", "random"):
            raise UserError(f"captions.pick ({self.pick}) must be first or random")
        if not self.json_field:
            raise UserError('captions.json_field ("") must name a field, e.g. caption')

    def always_first(self) -> "CaptionRule":
        """Return the same rule without a draw, as evaluations need it."""
        return replace(self, pick="first")

    def choose(
        self,
        members: Iterable[tuple[str, bytes]],
        key: tuple[int, ...],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> str:
        """Take the caption of a sample.

        Args:
            members: (extension, bytes) of those the sample has, in order of preference; read no
                further than needed.
            key: of the place in the stream, integers >= 0.
            is_empty: tells texts that count for nothing, by the tokenizer of the model if it is
                known.

        Returns:
            The text without white space at both ends, cut to ``MAX_CAPTION_CHARACTERS``: more
            than any tokenizer keeps.

        Raises:
            BadSampleError: if a member that is looked at cannot be read, or all are empty.

        Example:
            >>> CaptionRule().choose([("txt", b" a red fox ")], (0,))
            'a red fox'
            >>> rule = CaptionRule(members=("json",), json_field="seo.alt")
            >>> rule.choose([("json", b'{"seo": {"alt": ["", "a hen", "a bird"]}}')], (0,))
            'a hen'
        """
        found: list[str] = []
        problem = EMPTY_CAPTION
        for extension, data in members:
            try:
                found += self._alternatives(extension, data, is_empty)
            except MissingFieldError as error:  # as null: the next member may have a caption
                problem = str(error)
            if found and self.pick == "first":
                return found[0]
        if not found:
            raise BadSampleError(problem)
        return found[draw_one(len(found), *key, _CAPTION_DRAW)]

    def all_of(
        self,
        members: Iterable[tuple[str, bytes]],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> list[str]:
        r"""List all captions of a sample, of the first member that has any.

        Args:
            members: as ``choose``.
            is_empty: as ``choose``.

        Raises:
            BadSampleError: as ``choose``.

        Example:
            >>> CaptionRule(split_lines=True).all_of([("txt", b"a hen\na bird")])
            ['a hen', 'a bird']
        """
        problem = EMPTY_CAPTION
        for extension, data in members:
            try:
                found = self._alternatives(extension, data, is_empty)
            except MissingFieldError as error:
                problem = str(error)
                continue
            if found:
                return found
        raise BadSampleError(problem)

    def _alternatives(
        self, extension: str, data: bytes, is_empty: Callable[[str], bool]
    ) -> list[str]:
        """List the captions of one member that are not empty."""
        if extension == "json":
            texts = texts_of(field_of(read_json(data), self.json_field), self.json_field)
        else:
            text = _decode(data)
            texts = split_lines(text) if self.split_lines else [text]
        cut = (text.strip()[:MAX_CAPTION_CHARACTERS].rstrip() for text in texts)
        return [text for text in cut if text and not is_empty(text)]


class MissingFieldError(BadSampleError):
    """A JSON lacks a field."""


def split_lines(text: str) -> list[str]:
    r"""Split a text at line ends, and nowhere else.

    ``str.splitlines`` also splits at form feeds, separators and other characters that a caption
    may hold.

    Example:
        >>> split_lines("a hen\r\na bird\n"), len(split_lines("a\u2028b\x0cc\x85d"))
        (['a hen', 'a bird', ''], 1)
    """
    return text.replace("\r\n", "\n").split("\n")


def decode_caption(data: bytes) -> str:
    """Decode a text that is one caption.

    Raises:
        BadSampleError: if it is too long, not UTF-8, or empty.

    Example:
        >>> decode_caption(b" a red fox ")
        'a red fox'
    """
    return CaptionRule().choose([("txt", data)], ())


def read_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON member.

    Args:
        data: UTF-8, at most ``MAX_CAPTION_BYTES`` long.

    Raises:
        BadSampleError: if it is too long, not JSON, or no object.
    """
    try:
        parsed = json.loads(_decode(data))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadSampleError(f"JSON cannot be read: {reason}") from error
    if not isinstance(parsed, dict):
        raise BadSampleError(f"JSON holds a {type(parsed).__name__}, not an object")
    return parsed


def field_of(record: dict[str, Any], path: str) -> Any:
    """Look up a field, "a.b" for field b of the object, or of each object of a list, in field a.

    Objects of a list that lack the field are passed over.

    Raises:
        MissingFieldError: if there is no such field.

    Example:
        >>> field_of({"a": {"b": 1}, "a.c": 2}, "a.b"), field_of({"a.c": 2}, "a.c")
        (1, 2)
        >>> field_of({"sentences": [{"raw": "a hen"}, {"raw": "a bird"}]}, "sentences.raw")
        ['a hen', 'a bird']
    """
    if path in record:
        return record[path]
    first, _, rest = path.partition(".")
    inner = record.get(first)
    if rest and isinstance(inner, dict):
        return field_of(inner, rest)
    if rest and isinstance(inner, list) and all(isinstance(each, dict) for each in inner):
        found = []
        for each in inner:
            with suppress(MissingFieldError):
                found.append(field_of(each, rest))
        if found:
            return found
    raise MissingFieldError(f"JSON has no field {path!r}")


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


def texts_of(value: Any, path: str) -> list[str]:
    """List the texts of a JSON field: a string, a list of strings, or null for none.

    Args:
        value: of the field.
        path: its name, for the error text.

    Raises:
        BadSampleError: if it holds anything else, or half a character.

    Example:
        >>> texts_of(["a hen", "a bird"], "caption"), texts_of("a hen", "caption")
        (['a hen', 'a bird'], ['a hen'])
    """
    texts = value if isinstance(value, list) else [] if value is None else [value]
    for text in texts:
        if not isinstance(text, str):
            raise BadSampleError(
                f"JSON field {path!r} holds a {type(text).__name__}, not a string or a list of them"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # no tokenizer takes it
            raise BadSampleError(f"JSON field {path!r} is not UTF-8: it holds half a character")
    return texts


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


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSampleError(f"caption of {len(data)} bytes, at most {MAX_CAPTION_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"caption is not UTF-8: {error.reason} at {error.start}") from error
