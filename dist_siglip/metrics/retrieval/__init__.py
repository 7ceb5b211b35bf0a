"""Retrieval among the items of all ranks."""
