"""Embeddings of whole data sets: shards in, one row for every sample out."""

from dist_siglip.evaluation.embed.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.shard_job import EmbedReport

__all__ = ["EmbedReport", "EmbedSettings", "embed_shards"]
