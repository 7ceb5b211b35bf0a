"""Towers: open_clip architectures by name, with or without weights, as one dual encoder."""

from dist_siglip.models.build import BuiltModel, build_dual_encoder
from dist_siglip.models.dual_encoder import DualEncoder, compile_towers

__all__ = ["BuiltModel", "DualEncoder", "build_dual_encoder", "compile_towers"]
