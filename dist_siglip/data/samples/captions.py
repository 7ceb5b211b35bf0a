"""Captions of a sample: which there are, and which one is taken.

A sample may offer several captions: in several members, lines of one, or entries of a list inside
its JSON. A ``CaptionRule`` says which are meant, and which of them a position in the stream gets.
"""

import html
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dist_siglip.data.order.sequence import Draw, draw_one
from dist_siglip.data.parquet.rows import TextList
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.errors import UserError

Tokenizer = Callable[[list[str]], Tensor]


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


MAX_CAPTION_BYTES = 1 << 20
MAX_CAPTION_CHARACTERS = 4096
_SUM_ERROR = 1e-3  # by which probabilities may miss 1
EMPTY_CAPTION = "caption is empty"


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """Where the captions of a sample are, and which one is taken.

    Args:
        members: extensions of the members, or columns of Parquet, that hold captions, best first; a
            sample needs one. Of ``json``, or a row of Parquet, ``json_field`` counts.
        json_field: name of the field that holds a caption or a list of them; "a.b" is field b of
            the object in field a, or of each object of the list there ("sentences.raw").
        pick: "first" takes the first caption that is not empty; "random" draws one of all, a
            function of the place in the stream: another in the next epoch, the same when a run
            resumes. Evaluations always take the first.
        split_lines: whether each line of a text member is a caption of its own.
        weights: fields whose captions train together, one of each in every step, with the weight,
            above 0, of the loss of each. A field is a member ("txt"), a field of the .json
            ("seo.alt"), or one of another JSON member ("syn.json:syn_text"). A sample without it
            shows the first field it has once more. Evaluations see the first field alone.
        probabilities: fields of which each sample shows one in each step, with the probability of
            each, which sum to 1: a function of the place in the stream. Fields that a sample lacks
            leave theirs to the others. Evaluations see the first field.
        negatives: field of a JSON member, named as in ``weights``, with texts that do not belong to
            the picture. They train as negatives of all pictures. Evaluations leave them out.
        num_negatives: of them for each picture and step, drawn by the place in the stream; a sample
            may have fewer, or none.
    """

    members: tuple[str, ...] = ("txt",)
    json_field: str = "caption"
    pick: Literal["first", "random"] = "first"
    split_lines: bool = False
    weights: dict[str, float] | None = None
    probabilities: dict[str, float] | None = None
    negatives: str | None = None
    num_negatives: int = 1

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: if no member is named, the rule is neither "first" nor "random", or fields
                are not to be found or have shares that cannot be.
        """
        if not self.members or not all(self.members):
            raise UserError(f'captions.members ({list(self.members)}) must name one, e.g. ["txt"]')
        if self.pick not in ("first", "random"):
            raise UserError(f"captions.pick ({self.pick}) must be first or random")
        if not self.json_field:
            raise UserError('captions.json_field ("") must name a field, e.g. caption')
        if self.weights is not None and self.probabilities is not None:
            raise UserError(
                "captions.weights and captions.probabilities are both set: fields train together, "
                "or one is drawn; leave one of the two out"
            )
        for setting, shares in (("weights", self.weights), ("probabilities", self.probabilities)):
            if shares is not None:
                self._check_shares(f"captions.{setting}", shares)
        if self.negatives is not None:
            self._check_negatives(self.negatives)

    def _check_negatives(self, name: str) -> None:
        member, _ = self._place(name) if name else ("", "")
        is_own = _plain(name) in self._members
        if is_own or not _is_json(member) or member not in self._members:
            raise UserError(
                f"captions.negatives ({name!r}) must name a field of a JSON member that "
                f"captions.members ({list(self.members)}) has, such as swapped, or neg.json:texts"
            )
        if name in self.fields:
            raise UserError(f"captions.negatives ({name}) names captions, too; name another field")
        if self.num_negatives < 1:
            raise UserError(f"captions.num_negatives ({self.num_negatives}) must be at least 1")

    def _check_shares(self, setting: str, shares: dict[str, float]) -> None:
        if not shares:
            raise UserError(f"{setting} ({{}}) must name a field, e.g. caption, or be null")
        least = "above 0; leave the field out" if self.weights else "a number in [0, 1]"
        for name, share in shares.items():
            if not (math.isfinite(share) and (share > 0 or (share == 0 and not self.weights))):
                raise UserError(f"{setting}.{name} ({share}) must be {least}")
            member, _ = self._place(name)
            if member not in self._members:
                raise UserError(
                    f"{setting}.{name}: its member ({member}) is not one of captions.members "
                    f"({list(self.members)}); add {member} there, or name another field"
                )
        total = sum(shares.values())
        if self.probabilities and abs(total - 1) > _SUM_ERROR:
            raise UserError(f"{setting} ({shares}) must sum to 1, not {total:g}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that weights or probabilities name; none where members alone decide."""
        return tuple(self.weights or self.probabilities or ())

    @property
    def json_fields(self) -> tuple[str, ...]:
        """Fields of the ``.json`` that are looked at."""
        places = map(self._place, filter(None, (*self.fields, self.negatives)))
        return (self.json_field, *(path for member, path in places if member == "json"))

    @property
    def _members(self) -> set[str]:
        return {_plain(name) for name in self.members}

    def _place(self, name: str) -> tuple[str, str]:
        """Return the member of a field, and which field of it counts if it is JSON."""
        if _plain(name) in self._members:
            return _plain(name), self.json_field
        member, colon, path = name.partition(":")
        return (_plain(member), path) if colon else ("json", name)

    def always_first(self) -> "CaptionRule":
        """Return the same rule without a draw, as evaluations need it."""
        in_order = dict.fromkeys(self.fields, 1.0) or None
        return replace(self, pick="first", weights=in_order, probabilities=None, negatives=None)

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
        if self.fields:
            by_field = self.by_field(members, is_empty=is_empty)
            return self._pick(by_field[self._drawn(by_field, key)], key)
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
        return self._pick(found, key)

    def choose_each(
        self,
        members: Iterable[tuple[str, bytes]],
        key: tuple[int, ...],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> list[str]:
        """Take the captions of a sample that train together: one without ``weights``.

        Args:
            members: as ``choose``.
            key: as ``choose``.
            is_empty: as ``choose``.

        Raises:
            BadSampleError: as ``choose``, if the sample has none of the fields.

        Example:
            >>> rule = CaptionRule(members=("json",), weights={"alt": 1.0, "long": 2.0})
            >>> rule.choose_each([("json", b'{"alt": "a hen", "long": "a hen in grass"}')], (0,))
            ['a hen', 'a hen in grass']
            >>> rule.choose_each([("json", b'{"long": "a hen in grass"}')], (0,))
            ['a hen in grass', 'a hen in grass']
        """
        if self.weights is None:
            return [self.choose(members, key, is_empty=is_empty)]
        found = self.by_field(members, is_empty=is_empty)
        first = next(iter(found.values()))
        return [
            self._pick(found.get(name, first), key, number)
            for number, name in enumerate(self.weights)
        ]

    def choose_negatives(
        self,
        members: Iterable[tuple[str, bytes]],
        key: tuple[int, ...],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> list[str]:
        """Take ``num_negatives`` texts that do not belong to the picture; "" for missing ones.

        Raises:
            BadSampleError: if their member cannot be read.

        Example:
            >>> rule = CaptionRule(members=("txt", "json"), negatives="swapped")
            >>> rule.choose_negatives([("txt", b"a hen"), ("json", b'{"swapped": "a pen"}')], (0,))
            ['a pen']
        """
        if self.negatives is None:
            return []
        member, path = self._place(self.negatives)
        left: list[str] = []
        for extension, data in members:
            if _plain(extension) == member:
                with suppress(MissingFieldError):
                    left = self._alternatives(member, data, is_empty, path)
        return [
            left.pop(draw_one(len(left), *key, Draw.NEGATIVE, number)) if left else ""
            for number in range(self.num_negatives)
        ]

    def by_field(
        self,
        members: Iterable[tuple[str, bytes]],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> dict[str, list[str]]:
        """List the captions of a sample under each of ``fields`` that it has, in their order.

        Raises:
            BadSampleError: if a member cannot be read, or there is no caption.
        """
        data = {_plain(extension): each for extension, each in members}
        found: dict[str, list[str]] = {}
        problem = EMPTY_CAPTION
        for name in self.fields:
            member, path = self._place(name)
            if member not in data:
                continue
            try:
                if texts := self._alternatives(member, data[member], is_empty, path):
                    found[name] = texts
            except MissingFieldError as error:
                problem = str(error)
        if not found:
            raise BadSampleError(problem)
        return found

    def _drawn(self, found: dict[str, list[str]], key: tuple[int, ...]) -> str:
        """Name the field that a position shows, of those there are."""
        first = next(iter(found))
        if self.probabilities is None:
            return first
        likely = {name: self.probabilities[name] for name in found if self.probabilities[name]}
        left = draw_one(2**53, *key, Draw.FIELD) / 2**53 * sum(likely.values())
        for name, probability in likely.items():
            left -= probability
            if left < 0:
                return name
        return next(reversed(likely), first)

    def _pick(self, texts: list[str], key: tuple[int, ...], number: int = 0) -> str:
        """Take one of the captions of the field of a number."""
        if self.pick == "first":
            return texts[0]
        return texts[draw_one(len(texts), *key, Draw.CAPTION, *([number] if number else []))]

    def all_of(
        self,
        members: Iterable[tuple[str, bytes]],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> list[str]:
        r"""List all captions of a sample, of the first member, or field, that has any.

        Args:
            members: as ``choose``.
            is_empty: as ``choose``.

        Raises:
            BadSampleError: as ``choose``.

        Example:
            >>> CaptionRule(split_lines=True).all_of([("txt", b"a hen\na bird")])
            ['a hen', 'a bird']
        """
        if self.fields:
            return next(iter(self.by_field(members, is_empty=is_empty).values()))
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
        self, extension: str, data: bytes, is_empty: Callable[[str], bool], path: str | None = None
    ) -> list[str]:
        """List the captions of one member that are not empty; of JSON those in a field."""
        if isinstance(data, TextList):
            texts = texts_of(json.loads(data), extension)
        elif _is_json(extension):
            path = path or self.json_field
            texts = texts_of(field_of(read_json(data), path), path)
        else:
            text = _decode(data)
            texts = split_lines(text) if self.split_lines else [text]
        cut = (text.strip()[:MAX_CAPTION_CHARACTERS].rstrip() for text in texts)
        return [text for text in cut if text and not is_empty(text)]


def _is_json(extension: str) -> bool:
    return extension == "json" or extension.endswith(".json")


def _plain(extension: str) -> str:
    return extension.lower().lstrip(".")


class MissingFieldError(BadSampleError):
    """A JSON lacks a field."""


def split_lines(text: str) -> list[str]:
    r"""Split a text at line ends alone; ``str.splitlines`` also splits at form feeds and others.

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


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSampleError(f"caption of {len(data)} bytes, at most {MAX_CAPTION_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"caption is not UTF-8: {error.reason} at {error.start}") from error
