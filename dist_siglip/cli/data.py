"""``data``: look at shards, index them, write them."""

from collections.abc import Sequence

from dist_siglip.cli.subjects import run_subject

SUBJECTS = {
    "pack": ("dist_siglip.cli.data_pack", "a table and its pictures, or a folder, to shards"),
}


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse ``data SUBJECT ...`` and run the subject."""
    return run_subject(verb, SUBJECTS, arguments)
