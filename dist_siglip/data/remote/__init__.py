"""Shards that are not on this machine: whole copies, verified, in a bounded cache of the node."""

from dist_siglip.data.remote.cache import CacheSettings, ShardCache
from dist_siglip.data.remote.connections import RemoteError, RemoteOutageError
from dist_siglip.data.remote.locations import is_remote

__all__ = ["CacheSettings", "RemoteError", "RemoteOutageError", "ShardCache", "is_remote"]
