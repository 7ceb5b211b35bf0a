"""``data``: shards looked at, written and planned, without training."""

from collections.abc import Sequence

from dist_siglip.cli.subjects import run_subject

SUBJECTS = {
    "index": ("dist_siglip.cli.data_index", "find every sample of every shard, in parallel"),
    "check": ("dist_siglip.cli.data_check", "find damaged shards and samples; exit code 1 if any"),
    "stats": ("dist_siglip.cli.data_stats", "sizes, aspect ratios, captions, duplicates"),
    "pack": ("dist_siglip.cli.data_pack", "write shards from a folder of pictures and a table"),
    "plan": ("dist_siglip.cli.data_plan", "which rank reads what, without training"),
}


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse ``data SUBJECT ...`` and run the subject."""
    return run_subject(verb, SUBJECTS, arguments)
