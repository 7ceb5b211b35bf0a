"""Embeddings of whole data sets: shards in, one row for every sample out."""

from dist_siglip.embedding.embed import EmbedReport, EmbedSettings, embed_shards

__all__ = ["EmbedReport", "EmbedSettings", "embed_shards"]
