"""When is a failed transfer tried again, and what is said about it?

After a pause that doubles, and is drawn around that so that a thousand nodes do not come back
together; except where trying again cannot help: the file is not there, or access is denied.
"""

import errno
import logging
import random
from collections.abc import Callable
from typing import Any, TypeVar

from dist_siglip.data.remote.locations import redact
from dist_siglip.data.remote.stopping import pause
from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MISSING = "it does not exist"
_DENIED = "access is denied; credentials come from the environment"
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore
_REFUSALS = {
    400: "the server refuses the request",
    401: _DENIED,
    403: _DENIED,
    404: _MISSING,
    405: "the server refuses the request",
    410: _MISSING,
}


class RemoteError(Exception):
    """A remote file cannot be had; one line with the URL, the attempts and the last reason.

    Attributes:
        is_missing: whether the server says that there is no such file.
    """

    def __init__(self, text: str, *, is_missing: bool = False) -> None:
        super().__init__(text)
        self.is_missing = is_missing

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (str(self), self.is_missing)


def attempt(
    url: str,
    attempts: int,
    call: Callable[[], _Result],
    on_retry: Callable[[], object] = lambda: None,
) -> _Result:
    """Call until it works, or trying again cannot help.

    Args:
        url: what is asked for, for the error text.
        attempts: most calls, at least 1.
        call: raises anything if it fails.
        on_retry: called before every call but the first.

    Raises:
        RemoteError: if it fails for the last time.
        UserError: as ``call`` raises it.
        OSError: if this machine does not take the bytes (disk full, file too large).
    """
    for number in range(1, attempts + 1):
        try:
            return call()
        except (UserError, RemoteError):
            raise
        except Exception as error:  # each package raises classes of its own
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                raise
            refusal = _refusal(error)
            reason = refusal or _reason(error)
        if refusal or number == attempts:
            tries = "1 attempt" if number == 1 else f"{number} attempts"
            raise RemoteError(
                f"{redact(url)} cannot be fetched ({tries}): {reason}",
                is_missing=refusal == _MISSING,
            )
        seconds = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (number - 1))
        _LOGGER.info("%s: %s; attempt %d follows", redact(url), reason, number + 1)
        pause(seconds * random.uniform(0.5, 1.5))
        on_retry()
    raise AssertionError("attempts is at least 1")


def _restore(text: str, is_missing: bool) -> RemoteError:
    return RemoteError(text, is_missing=is_missing)


def _refusal(error: BaseException) -> str | None:
    """Return why trying again cannot help; None if it may."""
    status = _status(error) or _status(error.__cause__)
    if status is not None:
        return _REFUSALS.get(status)
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return _MISSING
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return _DENIED
    return None


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an exception, if it tells one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # aiohttp's own "code" is 400 for a connection that was cut; gcsfs means the server's.
    own = error if type(error).__name__ == "HttpError" else None
    for holder, field in ((error, "status"), (response, "status_code"), (own, "code")):
        value = getattr(holder, field, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _reason(error: BaseException) -> str:
    """Describe a failure in one line, without what a URL hides."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = _status(cause)
    if status is not None:
        return f"the server answered {status}"
    text = " ".join(redact(str(cause)).split())[:200]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
