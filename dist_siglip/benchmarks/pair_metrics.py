"""What does an evaluation of ``fit`` say about other shards? All its metrics, on any pairs."""

from torch.distributed import ProcessGroup

from dist_siglip.benchmarks.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.benchmarks.shards import BenchmarkShards, LoadSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.metrics import evaluate_pairs


class PairMetrics(Benchmark):
    """Retrieval, logits, constellation, gap and geometry of pairs, as a validation has them.

    Metrics: those of ``dist_siglip.metrics.evaluate_pairs``. Of several captions the first counts;
    an equal caption is a hit, and so is another caption of an equal picture.

    Args:
        shards: webdataset shards of pictures and captions, as ``data.val_shards``.
        name: of this benchmark.
        captions: where captions are.
        global_batch_size: pairs of the random batch whose loss is estimated. Null: the gallery.
        loading: how the shards are read.
    """

    task = "pair_metrics"

    def __init__(
        self,
        shards: str | list[str],
        name: str = "pair_metrics",
        captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
        global_batch_size: int | None = None,
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._global_batch_size = global_batch_size
        self._shards = BenchmarkShards(shards, captions, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings and shards.

        Raises:
            UserError: naming it.
        """
        super().check()
        if self._global_batch_size is not None and self._global_batch_size < 1:
            raise UserError(
                f"global_batch_size ({self._global_batch_size}) of benchmark {self.name!r} must be "
                "at least 1"
            )
        self._shards.check()

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Evaluate all pairs on one gallery; see the base class for the contract.

        Raises:
            UserError: on every rank: features are not finite, or too many samples cannot be used.
        """
        encoded = self._shards.encode(model, encoded_texts=1, group=group)
        ids = encoded.caption_ids
        evaluation = evaluate_pairs(
            encoded.image_features,
            encoded.text_features,
            ids,
            ids,
            encoded.sample_ids,
            logit_scale=model.logit_scale,
            logit_bias=model.logit_bias,
            picture_ids=encoded.picture_ids,
            global_batch_size=self._global_batch_size,
            group=group,
        )
        return BenchmarkResult(evaluation.metrics, {"left_out": encoded.num_bad})
