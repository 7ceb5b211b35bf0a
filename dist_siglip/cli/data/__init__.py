"""``data``: look at shards, index them, write them."""

from collections.abc import Sequence

from dist_siglip.cli.parser import run_subcommand

SUBCOMMANDS = {
    "index": ("dist_siglip.cli.data.shards", "side-cars of shards, made ahead of training"),
    "check": ("dist_siglip.cli.data.shards", "everything that is wrong with shards"),
    "stats": ("dist_siglip.cli.data.overview", "sizes, formats, caption lengths, duplicates"),
    "plan": ("dist_siglip.cli.data.overview", "who reads what, for any number of ranks"),
    "pack": ("dist_siglip.cli.data.shards", "a table and its pictures, or a folder, to shards"),
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse ``data SUBCOMMAND ...`` and run the subcommand."""
    return run_subcommand(command, SUBCOMMANDS, arguments)
