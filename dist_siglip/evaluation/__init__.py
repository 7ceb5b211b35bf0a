"""Benchmarks: what a model is worth on data it was not trained on."""

from dist_siglip.evaluation.arithmetic import HandwritingArithmetic, Simat
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.classification import Classification
from dist_siglip.evaluation.dense import HandwritingPatches, PatchSegmentation
from dist_siglip.evaluation.retrieval import PairMetrics, Retrieval

__all__ = [
    "Benchmark",
    "BenchmarkResult",
    "Classification",
    "EvaluatedModel",
    "HandwritingArithmetic",
    "HandwritingPatches",
    "PairMetrics",
    "PatchSegmentation",
    "Retrieval",
    "Simat",
]
