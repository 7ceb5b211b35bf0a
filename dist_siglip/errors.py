"""Errors that the command line prints as one line, and their exit codes.

Everything below the command line raises ``UserError`` for a wrong value, a missing file or a
setting that cannot work, ``RunFailedError`` for a run that cannot go on although its settings are
sound, ``RunMovedError`` for one whose folder is gone, and ``OutageError`` if something elsewhere
does not answer. The command line prints the text as one line and exits with code 2, 3, 73 or 75.
A defect of the program is none of these: it keeps its traceback.
"""

__all__ = [
    "LoaderError",
    "OutageError",
    "RunFailedError",
    "RunMovedError",
    "UserError",
    "check_least",
]


class UserError(ValueError):
    """A mistake of the user, in one line: name, value, what is allowed, remedy.

    Example:
        >>> raise UserError("chunk_rows (0) must be at least 1")
        Traceback (most recent call last):
            ...
        dist_siglip.errors.UserError: chunk_rows (0) must be at least 1
    """


class RunMovedError(Exception):
    """A run whose folder was moved away under it, in one line: from where, to where, what to do.

    Example:
        >>> raise RunMovedError("runs/a was moved to runs/b while the run went on")
        Traceback (most recent call last):
            ...
        dist_siglip.errors.RunMovedError: runs/a was moved to runs/b while the run went on
    """


class RunFailedError(Exception):
    """A run that cannot go on, and would not if it were started again as it is.

    In one line: what happened, how often, what to look at or to change.

    Example:
        >>> raise RunFailedError("3 checkpoints in a row could not be written; make room")
        Traceback (most recent call last):
            ...
        dist_siglip.errors.RunFailedError: 3 checkpoints in a row could not be written; make room
    """


class OutageError(Exception):
    """Something outside of this machine is out of reach for now: the same command may work later.

    In one line: what, for how long it was tried, and the last answer.

    Example:
        >>> raise OutageError("https://host/a.tar cannot be fetched (5 attempts): no answer")
        Traceback (most recent call last):
            ...
        dist_siglip.errors.OutageError: https://host/a.tar cannot be fetched (5 attempts): no answer
    """


class LoaderError(RunFailedError):
    """A loader process that has died or failed, on this rank or another; ends with code 71."""

    exit_code = 71


def check_least(least: int, *, of: str = "", **settings: float | None) -> None:
    """Refuse settings below their least value; None passes.

    Args:
        least: of all that are given.
        of: group of the settings, with its dot.
        **settings: by name.

    Example:
        >>> check_least(1, of="cache.", attempts=0)
        Traceback (most recent call last):
            ...
        dist_siglip.errors.UserError: cache.attempts (0) must be at least 1
    """
    for name, value in settings.items():
        if value is not None and value < least:
            raise UserError(f"{of}{name} ({value}) must be at least {least}")
