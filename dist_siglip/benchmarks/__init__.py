"""What is a model worth on data it was not trained on? Each benchmark is a class of its own."""

from dist_siglip.benchmarks.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.benchmarks.classification import Classification
from dist_siglip.benchmarks.handwriting_arithmetic import HandwritingArithmetic
from dist_siglip.benchmarks.pair_metrics import PairMetrics
from dist_siglip.benchmarks.retrieval import Retrieval
from dist_siglip.benchmarks.simat import Simat

__all__ = [
    "Benchmark",
    "BenchmarkResult",
    "Classification",
    "EvaluatedModel",
    "HandwritingArithmetic",
    "PairMetrics",
    "Retrieval",
    "Simat",
]
