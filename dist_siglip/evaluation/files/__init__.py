"""Benchmarks with the annotation files of their authors."""
