"""Run folder, its checkpoints, and the identity and provenance of a run."""

from dist_siglip.runs.checkpoints.selection import (
    BestCheckpoint,
    Mode,
    check_sound,
    newest_sound_checkpoint,
    read_best,
)
from dist_siglip.runs.folder import RunFolder
from dist_siglip.runs.provenance import collect_provenance, describe_differences

__all__ = [
    "BestCheckpoint",
    "Mode",
    "RunFolder",
    "check_sound",
    "collect_provenance",
    "describe_differences",
    "newest_sound_checkpoint",
    "read_best",
]
