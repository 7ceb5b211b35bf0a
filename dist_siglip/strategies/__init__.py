"""How a model is spread over ranks, beyond what Lightning's own strategies do."""

from dist_siglip.strategies.fully_sharded import FullyShardedStrategy

__all__ = ["FullyShardedStrategy"]
