"""Towers: open_clip architectures by name, with or without weights, as one dual encoder."""

from dist_siglip.models.build import BuiltModel, build_dual_encoder
from dist_siglip.models.dual_encoder import (
    DualEncoder,
    TokenShape,
    compile_towers,
    encode_in_micro_batches,
    encode_tower_in_micro_batches,
    evaluation_mode,
    refuse_batch_norm,
)
from dist_siglip.models.reranker import (
    Encoded,
    FusionConfig,
    FusionHead,
    encode_image_tokens,
    encode_text_tokens,
    read_head,
    token_shapes,
    write_head,
)
from dist_siglip.models.weights import recorded_global_batch

__all__ = [
    "BuiltModel",
    "DualEncoder",
    "Encoded",
    "FusionConfig",
    "FusionHead",
    "TokenShape",
    "build_dual_encoder",
    "compile_towers",
    "encode_image_tokens",
    "encode_in_micro_batches",
    "encode_text_tokens",
    "encode_tower_in_micro_batches",
    "evaluation_mode",
    "read_head",
    "recorded_global_batch",
    "refuse_batch_norm",
    "token_shapes",
    "write_head",
]
