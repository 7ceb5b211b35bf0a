"""The samples of shards: where they lie, kept beside the shards and in tables."""
