"""Shards examined before training: what is wrong, and what they hold."""
