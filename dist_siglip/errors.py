"""The one exception for mistakes a person can mend.

Everything below the command line raises ``UserError`` for a wrong value, a missing file or a
setting that cannot work; the command line prints its text as one line and exits with code 2.
A defect of the program is never a ``UserError``: it keeps its traceback.
"""


class UserError(ValueError):
    """A mistake of the user, in one line: name, value, what is allowed, remedy.

    Example:
        >>> raise UserError("chunk_rows (0) must be at least 1")
        Traceback (most recent call last):
            ...
        dist_siglip.errors.UserError: chunk_rows (0) must be at least 1
    """
