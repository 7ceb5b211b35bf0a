"""Redaction of secrets: those of URLs, and values whose names say that they are some.

A URL may carry a user name, a password or a signature, and the settings of a tracker the key of an
account. Every text that a person, a log or a file gets goes through ``redact``. In doubt too much
is cut: people write passwords with slashes, question marks and at signs into URLs, where the
grammar of URLs does not allow them.
"""

import re
from collections.abc import Iterable

# From the scheme to white space or to what no URL holds. Schemes that are opened need no slashes
# to be taken for one: "https:/me:secret@host" is a slip of a pen, and a secret.
_URL = re.compile(
    r"((?<![A-Za-z0-9])(?:https?|s3|gs|hf):/*|[A-Za-z][A-Za-z0-9+.-]*://)([^\s\"<>]+)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"((?:[^'\\]|\\.)*)('.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[[^\]/]*\]|[^:/\[]*)(?::\d*)?(?:[/?#]|[:,;.)\]}'\\]*$)")
_SHOWN_BEFORE = re.compile(r"\.\.\.[:;,.)'\]}\\]*")
_CUT = "..."
_SECRET = (
    r"(?<![A-Za-z])(?:api[_-]?key|(?:access|auth|bearer|hf|wandb)[_-]?token|password|passwd|secret"
    r"|(?:access|account|private|secret)[_-](?:access[_-]?)?key|authorization)"
)
_SECRET_NAME = re.compile(f"{_SECRET}$", re.IGNORECASE)
# A name, "=" or ":", and what is in quotes, else what has no space; both may be escaped.
_NAMED = re.compile(
    rf"({_SECRET}\\*['\"]?\s*[:=]\s*(?:(?:bearer|basic)\s+)?)"
    r"(?:(\\*['\"])(?!\2|\.\.\.).+?(?=\2|$)"
    r"|(?!(?:null|None|~)(?:\W|$)|\.\.\.|(?:bearer|basic)\s)[^\s'\"\\,\]})]+)",
    re.IGNORECASE | re.MULTILINE,
)
_WITH_REVISIONS = ("s3:", "gs:", "hf:")  # "@" may stand in a path of these


def redact(text: str) -> str:
    """Cut user names, passwords, queries and fragments out of URLs, and values of secret names.

    Example:
        >>> redact("api_key: 12ab, shards: a.tar")
        'api_key: ..., shards: a.tar'
        >>> redact("cannot open https://me:secret@host/a.tar?sig=12ab")
        'cannot open https://host/a.tar?...'
        >>> redact("https://me:sec/ret@host/a.tar"), redact("hf://datasets/me/set@main/a.tar")
        ('https://...@host/a.tar', 'hf://datasets/me/set@main/a.tar')
    """
    text = _URL.sub(_shown, text)
    return _NAMED.sub(lambda found: f"{found[1]}{found[2] or ''}{_CUT}", text)


def redact_setting(name: str, value: object) -> str:
    """Write the value of a setting without secrets.

    Example:
        >>> redact_setting("logger.api_key", "12ab"), redact_setting("data.shards", "a.tar")
        ('...', 'a.tar')
    """
    is_secret = value not in (None, "") and _SECRET_NAME.search(name)
    return _CUT if is_secret else redact(str(value))


def redact_arguments(arguments: Iterable[str]) -> list[str]:
    """Cut secrets out of a command line, where a name and its value may be two arguments.

    Example:
        >>> redact_arguments(["fit", "--logger.api_key", "12ab", "--data.seed=0"])
        ['fit', '--logger.api_key', '...', '--data.seed=0']
    """
    found, before = [], ""
    for each in arguments:
        name = before if before.startswith("-") and not each.startswith("--") else ""
        found.append(redact_setting(name, each))
        before = each
    return found


def _shown(found: re.Match[str]) -> str:
    """Return what is shown of one URL, and of what follows it without a space."""
    scheme, rest, behind = found[1], found[2], ""
    if found.start() and found.string[found.start() - 1] == "'":
        quoted = _QUOTED.fullmatch(rest)
        if quoted:
            rest, behind = quoted[1], redact(quoted[2])
    return scheme + _without_secrets(scheme.lower(), rest) + behind


def _without_secrets(scheme: str, rest: str) -> str:
    before, at, after = rest.rpartition("@")
    may_be_a_path = scheme.startswith(_WITH_REVISIONS) and "/" in before and ":" not in before
    if at and before != _CUT and not may_be_a_path:
        if set("?#") & set(before):  # of a password, or of a signature with an at sign
            return _CUT
        rest = f"{_CUT}@{after}" if "/" in before else after
    if not _AUTHORITY.match(rest.removeprefix(f"{_CUT}@")):  # a password that a space has cut
        return _CUT
    place = re.match(r"[^?#]*", rest)
    shown = place[0] if place else ""
    query = rest[len(shown) :]
    if not query or _SHOWN_BEFORE.fullmatch(query[1:]):
        return rest
    return f"{shown}{query[0]}{_CUT}"
