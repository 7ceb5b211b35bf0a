"""The run folder: what a run leaves behind, where, and who may write it."""

from dist_siglip.runs.checkpoints.best import BestCheckpoint, Mode, read_best
from dist_siglip.runs.checkpoints.newest import check_sound, newest_sound_checkpoint
from dist_siglip.runs.folder import RunFolder
from dist_siglip.runs.identity import describe_differences
from dist_siglip.runs.provenance import collect_provenance

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
