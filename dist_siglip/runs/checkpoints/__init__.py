"""Checkpoints: written, verified, found again, kept or removed."""
