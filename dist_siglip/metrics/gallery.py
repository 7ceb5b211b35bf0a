"""How many pairs an evaluation saw, in words."""

from collections.abc import Mapping
from typing import Any


def describe_gallery(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Say how many pairs an evaluation saw, and of how many where it did not see all.

    Args:
        metrics: of an evaluation: ``gallery_pairs``, and ``available_pairs`` where it is known.
        prefix: of the names.

    Example:
        >>> describe_gallery({"gallery_pairs": 16.0, "available_pairs": 37.0})
        '16 of 37 pairs'
        >>> describe_gallery({"gallery_pairs": 37.0, "available_pairs": 37.0})
        '37 pairs'
    """
    seen, available = (metrics.get(f"{prefix}{kind}_pairs") for kind in ("gallery", "available"))
    if seen is None:
        return "an unknown number of pairs"
    if available is None or int(available) == int(seen):
        return f"{int(seen)} pairs"
    return f"{int(seen)} of {int(available)} pairs"
