"""Shards that are not on this machine: whole copies, verified, in a bounded cache of the node."""

from dist_siglip.data.remote.cache import CacheSettings, ShardCache
from dist_siglip.data.remote.locations import is_remote
from dist_siglip.data.remote.retries import RemoteError, RemoteOutageError

__all__ = ["CacheSettings", "RemoteError", "RemoteOutageError", "ShardCache", "is_remote"]
