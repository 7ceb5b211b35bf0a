"""Which samples have no embedding, and how many may that be?

``left_out/left_out_0.jsonl`` names those of the first shard: one JSON object a line with shard,
key, place and reason. A shard without bad samples has no such file.
"""

import json
import logging
from pathlib import Path

from dist_siglip.embedding.part import Part, PartRows
from dist_siglip.errors import UserError
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import open_text

_LOGGER = logging.getLogger(__name__)
_EARLY_SAMPLES = 1000  # before the share is judged for the first time
_NAMED = 5  # of each shard, in the log


def left_out_file(folder: Path, part: Part) -> Path:
    """Name the file of a part's bad samples."""
    return folder / "left_out" / f"left_out_{part.label}.jsonl"


def write_left_out(folder: Path, done: PartRows) -> None:
    """Name the bad samples of a part, in its file and the first of them in the log."""
    part, problems = done.part, done.rows.problems
    if not problems:
        return
    lines = []
    for number, (sample_id, reason) in enumerate(problems.items()):
        place = sample_id - part.first
        record = {"shard": part.shard, "key": done.keys[place], "place": place, "reason": reason}
        lines.append(json.dumps(record) + "\n")
        if number < _NAMED:
            _LOGGER.warning("left out: %s: %s", ascii(f"{part.shard}/{done.keys[place]}"), reason)
    write_atomically(left_out_file(folder, part), "".join(lines))


def is_all_left_out(folder: Path, part: Part) -> bool:
    """Tell whether a part is finished and has no row at all."""
    try:
        with open_text(left_out_file(folder, part)) as file:
            return sum(1 for _ in file) == part.num_samples
    except FileNotFoundError:
        return part.num_samples == 0


def check_share(
    folder: Path, left_out: int, samples: int, max_bad_fraction: float, *, is_end: bool
) -> None:
    """Stop if too many samples are left out; of the first thousand so many that it is certain.

    Raises:
        UserError: naming the limit and where the samples are listed.
    """
    judged = samples if is_end else max(samples, _EARLY_SAMPLES)
    if left_out > max_bad_fraction * judged:
        raise UserError(
            f"max_bad_fraction ({max_bad_fraction}) is exceeded: {left_out} of {samples} samples "
            f"cannot be used, listed in {folder / 'left_out'}; repair the shards, or raise it"
        )
