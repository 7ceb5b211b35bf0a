"""Embeddings of whole data sets: shards in, one row for every sample out."""

from dist_siglip.embedding.embed import EmbedSettings, embed_shards
from dist_siglip.embedding.tally import EmbedReport

__all__ = ["EmbedReport", "EmbedSettings", "embed_shards"]
