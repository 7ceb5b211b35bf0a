"""Retrieval over a data set with several captions a picture, and the pair metrics of a validation.

A picture may have several captions (five in COCO and Flickr30k), in one sample or in samples of
their own: pictures of equal bytes are one (or see ``loading.picture_field``). Each caption is a
query of its own; a picture has found its own if any of its captions is among the first k. A caption
belongs to its own picture only, though another picture may have an equal one, as in published
tables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.metrics import evaluate_pairs
from dist_siglip.metrics.retrieval.ranks import median_rank, recall_at_k, retrieval_ranks_both_ways
from dist_siglip.metrics.rows import first_of_each


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
        """Find what is wrong with settings and shards."""
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


class Retrieval(Benchmark):
    """Retrieval in both directions, with all captions of every picture.

    Metrics, with CLIP_benchmark's names: ``image_retrieval_recall@K`` (a caption looks for its
    picture), ``text_retrieval_recall@K`` (a picture looks for one of its captions); and beside them
    ``image_retrieval_median_rank`` and ``text_retrieval_median_rank``. Ties count against the
    query, where CLIP_benchmark leaves them to chance.

    Args:
        shards: webdataset shards of pictures and captions, as ``data.val_shards``.
        name: of this benchmark.
        captions: where captions are; all of a picture count. The default takes each line of a
            .txt, as CLIP_benchmark writes them, else the list in the field "caption" of a .json.
        top_k: the K of recall@K.
        loading: how the shards are read.
    """

    task = "zeroshot_retrieval"

    def __init__(
        self,
        shards: str | list[str],
        name: str = "retrieval",
        captions: CaptionRule = CaptionRule(members=("txt", "json"), split_lines=True),  # noqa: B008 - frozen dataclass
        top_k: Sequence[int] = (1, 5, 10),
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._top_k = tuple(top_k)
        self._shards = BenchmarkShards(shards, captions, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings and shards."""
        super().check()
        check_top_k(self._top_k, self.name)
        self._shards.check()

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Look for every caption and every picture; see the base class for the contract.

        Raises:
            UserError: on every rank: features are not finite, or too many samples cannot be used.
        """
        encoded = self._shards.encode(model, encoded_texts=None, group=group)
        pictures = first_of_each(encoded.picture_ids, encoded.sample_ids, group=group)
        owners = encoded.picture_ids[
            torch.searchsorted(encoded.sample_ids, encoded.text_sample_ids)
        ]
        # The same caption of the same picture in another sample is no other item.
        captions = first_of_each(
            torch.stack([owners, encoded.caption_ids], dim=1),
            encoded.text_sample_ids,
            group=group,
        )
        metrics, num_images, num_texts = retrieval_metrics(
            encoded.image_features[pictures],
            encoded.text_features[captions],
            encoded.picture_ids[pictures],
            owners[captions],
            self._top_k,
            group=group,
        )
        if not num_images:
            raise UserError(f"benchmark {self.name!r} has no picture that can be used")
        details = {"pictures": num_images, "captions": num_texts, "left_out": encoded.num_bad}
        return BenchmarkResult(metrics, details)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    top_k: Sequence[int],
    *,
    group: ProcessGroup | None = None,
) -> tuple[dict[str, float], int, int]:
    """Look for the picture of every caption and for a caption of every picture.

    Distributed contract: every rank passes its own rows, any number of them (0 too); as
    ``retrieval_ranks_both_ways``. Every rank gets the same result.

    Args:
        image_features: (B, D).
        text_features: (T, D).
        image_ids: (B,) int64, each once over all ranks.
        text_ids: (T,) int64, id of the picture that a caption belongs to.
        top_k: the K of recall@K.
        group: process group.

    Returns:
        Metrics by name, number of pictures, number of captions.
    """
    of_images, of_texts = (
        gather_rows(ranks, group)
        for ranks in retrieval_ranks_both_ways(
            image_features, text_features, image_ids, text_ids, group=group
        )
    )
    num_images, num_texts = len(of_images), len(of_texts)
    if not (num_images and num_texts):
        return {}, num_images, num_texts
    directions = (
        ("image_retrieval", of_texts, num_images),
        ("text_retrieval", of_images, num_texts),
    )
    metrics = {
        f"{direction}_recall@{k}": recall_at_k(ranks, k, gallery_size=gallery)
        for k in top_k
        for direction, ranks, gallery in directions
    }
    metrics |= {f"{name}_median_rank": median_rank(ranks) for name, ranks, _ in directions}
    return metrics, num_images, num_texts


def check_top_k(top_k: Sequence[int], name: str) -> None:
    """Refuse the K of recall@K that are none."""
    if not top_k or min(top_k) < 1:
        raise UserError(
            f"top_k ({list(top_k)}) of benchmark {name!r} must hold numbers of at least 1, e.g. "
            "[1, 5, 10]"
        )
