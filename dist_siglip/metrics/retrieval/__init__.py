"""Retrieval on one gallery over all ranks."""
