"""Benchmarks: what a model is worth on data it was not trained on."""

from dist_siglip.evaluation.arithmetic import HandwritingArithmetic, Simat
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.classification import Classification
from dist_siglip.evaluation.files.babel import BabelImageNet
from dist_siglip.evaluation.files.captions import FolderRetrieval
from dist_siglip.evaluation.files.choice import CaptionChoice
from dist_siglip.evaluation.patches.dense import HandwritingPatches, PatchSegmentation
from dist_siglip.evaluation.probe import LinearProbe
from dist_siglip.evaluation.retrieval import PairMetrics, Retrieval

__all__ = [
    "BabelImageNet",
    "Benchmark",
    "BenchmarkResult",
    "CaptionChoice",
    "Classification",
    "EvaluatedModel",
    "FolderRetrieval",
    "HandwritingArithmetic",
    "HandwritingPatches",
    "LinearProbe",
    "PairMetrics",
    "PatchSegmentation",
    "Retrieval",
    "Simat",
]
