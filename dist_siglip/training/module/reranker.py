"""Lightning module of a frozen dual encoder with a fusion head."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from dist_siglip.data import ImageTextBatch, Preprocessing
from dist_siglip.data.samples.batch import picture_ids_of
from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.losses.sampled_pairs import match_loss
from dist_siglip.metrics import Evaluation, PairEvaluation
from dist_siglip.models.reranker import (
    Encoded,
    FusionConfig,
    FusionHead,
    check_towers,
    encode_image_tokens,
    encode_text_tokens,
    token_shapes,
    tower_fingerprints,
)
from dist_siglip.training.module.captions import caption_weights_of, num_negatives_of
from dist_siglip.training.module.hard_negatives import (
    choose_hard_pairs,
    evaluate_reranking,
    judge_pairs,
)
from dist_siglip.training.module.run_module import RunModule, configure
from dist_siglip.training.module.trained import load_trained
from dist_siglip.training.optim import OptimConfig

logger = logging.getLogger(__name__)


class RerankerModule(RunModule):
    """Trains a fusion head on the tokens of a trained dual encoder, which stays as it is.

    Checkpoints hold the head alone, and digests of the towers.

    Args:
        run_dir: run whose dual encoder is taken, at its newest sound checkpoint.
        ckpt_path: another checkpoint of that run.
        model: in place of a run: an open_clip architecture, as of ``fit``.
        pretrained: weights of ``model``.
        weights_average: true takes the average that a checkpoint holds, false the weights it was
            made of; null the average of a run, of other weights what they put first.
        head: sizes of the fusion head.
        hard_negatives: wrong texts for each image, and wrong images for each text, of a training
            batch over all ranks.
        easy_negatives: other texts for each image of a training batch.
        candidates: items of a query that an evaluation re-ranks.
        pairs_per_pass: pairs the head judges at a time; the same gradients in less memory, for one
            more forward pass if a batch has more pairs.
        optim: optimizer and learning rate.
        global_batch_size: pairs of a training batch over all ranks. The command line takes it from
            the data.
    """

    def __init__(
        self,
        run_dir: str | None = None,
        ckpt_path: str | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        weights_average: bool | None = None,
        head: FusionConfig = FusionConfig(),  # noqa: B008 - frozen dataclass
        hard_negatives: int = 2,
        easy_negatives: int = 1,
        candidates: int = 10,
        pairs_per_pass: int = 4096,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen dataclass
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("hard_negatives", hard_negatives, 1),
            ("easy_negatives", easy_negatives, 0),
            ("candidates", candidates, 1),
            ("pairs_per_pass", pairs_per_pass, 1),
        ):
            if value < least:
                raise UserError(f"{name} ({value}) must be at least {least}")
        built = load_trained(
            run_dir=run_dir,
            ckpt_path=ckpt_path,
            model=model,
            pretrained=pretrained,
            weights_average=weights_average,
        )
        if built.random_parameters:
            raise UserError(
                f"model ({model}) has random weights ({min(built.random_parameters)}, ...), whose "
                "tokens mean nothing; name pretrained weights, or a run_dir"
            )
        self.built = built
        self._digests: Mapping[Tower, str] | None = None
        self.towers = built.encoder
        self.towers.keep_in_evaluation([self.towers.clip])
        shapes = token_shapes(built)
        self.head = FusionHead(
            shapes["image"],
            shapes["text"],
            head,
            dual_scale=built.start_scale,
            dual_bias=built.start_bias,
        )
        self.inputs = Preprocessing.of(built)
        self.hard_negatives, self.easy_negatives = hard_negatives, easy_negatives
        self.candidates, self.pairs_per_pass = candidates, pairs_per_pass
        self.optim = optim
        self.global_batch_size = global_batch_size
        self.evaluation = PairEvaluation()
        self._rows: list[tuple[Tensor, ...]] = []

    @property
    def digests(self) -> Mapping[Tower, str]:
        """Of the towers and what they are fed: a head reads no other tokens."""
        if self._digests is None:
            self._digests = tower_fingerprints(self.built)
        return self._digests

    def use_pictures(self, policy: PicturePolicy) -> None:
        """Take over what decides the pixels of pictures, and so of which tokens a head reads."""
        super().use_pictures(policy)
        self._digests = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of what trains: the towers are those of another run."""
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not name.startswith("towers.")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the state of what trains; the towers stay as they are."""
        towers = {f"towers.{name}": value for name, value in self.towers.state_dict().items()}
        return super().load_state_dict({**towers, **state_dict}, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down whose tokens the head reads, too."""
        checkpoint["towers"] = dict(self.digests)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the towers are those of the checkpoint, too."""
        check_towers(checkpoint["towers"], self.digests, "the head of the checkpoint")
        super().on_load_checkpoint(checkpoint)

    def setup(self, stage: str) -> None:
        """Refuse captions that would train together: a head is shown one of a pair."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        caption_weights_of(data, None)
        num_negatives_of(data, None)

    def on_fit_start(self) -> None:
        """Tell Lightning that the towers are in evaluation mode on purpose."""
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    @torch.no_grad()
    def encode(self, batch: ImageTextBatch) -> tuple[Encoded, Encoded]:
        """Encode both sides of a batch to features and tokens."""
        images = encode_image_tokens(self.towers, batch.images)
        return images, encode_text_tokens(self.towers, batch.texts)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Return this rank's share of the global loss; the mean over ranks is the loss."""
        self.step_timer.begin_encoding(self.device)
        images, texts = self.encode(batch)
        self.step_timer.end_encoding()
        ids = torch.stack([batch.caption_ids, picture_ids_of(batch)], dim=1)
        pairs = choose_hard_pairs(images, texts, ids, self.hard_negatives, self.easy_negatives)
        logits = judge_pairs(self._judge, pairs, self.pairs_per_pass)
        positives, negatives = logits.tensor_split([pairs.num_positives])
        loss = match_loss(positives, negatives)
        scale, bias = self.head.dual_scale.sum(), self.head.dual_bias.sum()
        return self.finish_step(batch, loss, images.features, texts.features, scale, bias)

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self.evaluation.reset()
        self._rows = []

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """Keep features and tokens of one batch of this rank."""
        images, texts = self.encode(batch)
        ids, valid = batch.caption_ids, batch.valid
        features = (images.features, texts.features)
        pictures = picture_ids_of(batch)
        self.evaluation.update(*features, ids, ids, batch.sample_ids, valid, picture_ids=pictures)
        columns = (*images, *texts, ids, batch.sample_ids, pictures)
        self._rows.append(tuple(column[valid] for column in columns))

    def on_validation_epoch_end(self) -> None:
        """Evaluate the dual encoder alone, then with its candidates re-ranked; log as val/..."""
        scale, bias = self.built.start_scale, self.built.start_bias
        evaluation = self.evaluation.compute(
            logit_scale=scale, logit_bias=bias, global_batch_size=self.global_batch_size
        )
        columns = [torch.cat(column) for column in zip(*self._rows, strict=True)]
        self.evaluation.reset()
        self._rows = []
        reranked = evaluate_reranking(
            self.head,
            Encoded(*columns[:3]),
            Encoded(*columns[3:6]),
            *columns[6:8],
            picture_ids=columns[8],
            candidates=self.candidates,
            pairs_per_pass=self.pairs_per_pass,
        )
        metrics = {**evaluation.metrics, **self.available_pairs(), **reranked}
        metrics["rerank_candidates"] = float(self.candidates)
        self.last_evaluation = Evaluation(metrics, evaluation.arrays)
        self.last_evaluated_step = self.steps_done
        # Every rank has the same numbers; nothing is left to synchronise.
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(values, sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and its schedule, stepped every optimizer step."""
        return configure(self, self.optim, {}, is_sharded=False)

    def _judge(self, images: Encoded, texts: Encoded) -> Tensor:
        logits: Tensor = self.head(images, texts).logits
        return logits
