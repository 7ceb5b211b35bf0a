"""Weights of files, read safely and put into a network."""
