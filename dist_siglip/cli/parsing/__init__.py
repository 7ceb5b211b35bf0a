"""The parsers of the command line and the ranges of its numbers."""
