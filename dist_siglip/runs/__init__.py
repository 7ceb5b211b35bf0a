"""The run folder: what a run leaves behind, where, and who may write it."""

from dist_siglip.runs.folder import RunFolder
from dist_siglip.runs.identity import describe_differences
from dist_siglip.runs.provenance import collect_provenance

__all__ = ["RunFolder", "collect_provenance", "describe_differences"]
