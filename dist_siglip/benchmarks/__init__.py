"""What is a model worth on data it was not trained on? Each benchmark is a class of its own."""

from dist_siglip.benchmarks.benchmark import Benchmark, BenchmarkResult, EvaluatedModel

__all__ = ["Benchmark", "BenchmarkResult", "EvaluatedModel"]
