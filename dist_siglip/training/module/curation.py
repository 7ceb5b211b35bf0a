"""Curation of a step: of the pairs that the data bring, those train that are worth it.

The data bring a large batch, exactly as without curation: its place in the stream is the position
of the run. Learner and reference encode it without gradient, the pairs are chosen over all ranks,
and rows move between ranks until each has an equal, consecutive part of the chosen ones. What
trains is then a global batch like any other, in the order of the stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.distributed import fetch_rows, gather_rows, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    TeacherFeatures,
    duplicates_of,
    ids_for,
    uses_logit_bias,
    uses_teachers,
)
from dist_siglip.losses.kernels.pair_terms import join_ids
from dist_siglip.losses.research.curation import LearnabilityScores, choose_learnable
from dist_siglip.objectives.objective import uniform
from dist_siglip.training.module.objectives import draws_of
from dist_siglip.training.module.teachers import Teachers

_FIRST_STREAM = 1 << 16  # of random numbers; those below are of objectives


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Choice of the pairs that train from the larger batch that the data bring.

    Args:
        filter_ratio: share of the batch that is left out, in (0, 1): of B = global_batch_size
            pairs round((1 - filter_ratio) * B) train. SigLIP 2 takes .5 for B/16 and .75 for B/32,
            JEST .8.
        chunks: in which they are chosen; more follow closer what the chosen ones lack.
    """

    filter_ratio: float = 0.5
    chunks: int = 16

    def check(self, loss: nn.Module) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: if a number is out of range, or the loss is no sigmoid loss.
        """
        if not 0 < self.filter_ratio < 1:
            raise UserError(
                f"curation.filter_ratio ({self.filter_ratio}) must be between 0 and 1; for all "
                "pairs leave curation out"
            )
        if self.chunks < 1:
            raise UserError(f"curation.chunks ({self.chunks}) must be at least 1")
        if not uses_logit_bias(loss):
            raise UserError(
                f"curation scores pairs by the sigmoid loss, and loss ({type(loss).__name__}) has "
                "no bias; take dist_siglip.losses.SigLipLoss, or leave curation out"
            )

    def size_of(self, num_pairs: int, world_size: int = 1) -> int:
        """Return how many of a batch train.

        Args:
            num_pairs: of the batch, over all ranks.
            world_size: ranks, which share them equally.

        Raises:
            UserError: if that is not possible.

        Example:
            >>> CurationConfig(filter_ratio=0.75, chunks=2).size_of(16, 2)
            4
        """
        size = round((1 - self.filter_ratio) * num_pairs)
        what = (
            f"curation.filter_ratio ({self.filter_ratio}) leaves {size} of global_batch_size "
            f"({num_pairs}) pairs"
        )
        if size < self.chunks:
            raise UserError(
                f"{what}, fewer than curation.chunks ({self.chunks}); take fewer chunks or a "
                "larger batch"
            )
        if size % world_size:
            raise UserError(
                f"{what}, which {world_size} ranks cannot share equally; change one of the two"
            )
        return size


@torch.no_grad()
def curate(
    batch: ImageTextBatch,
    encode: Callable[[ImageTextBatch], tuple[Tensor, Tensor]],
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    teachers: Teachers,
    loss: nn.Module,
    config: CurationConfig,
    step: int,
    micro_batch_size: int | None,
) -> tuple[ImageTextBatch, TeacherFeatures | None, dict[str, Tensor]]:
    """Choose the pairs of a step from those of all ranks.

    A pair is scored by the first of its captions. What is random follows from the draws of the
    batch, which depend on seed, epoch and position.

    Distributed contract: every rank passes its own rows and gets an equal part of the chosen ones,
    which are the same on any number of ranks, see ``choose_learnable``. Its collectives, and an
    all-to-all for each field of the batch.

    Args:
        batch: of this rank.
        encode: batch to (B, D) features each, L2-normalised, of towers in evaluation mode.
        logit_scale: of the learner, one element.
        logit_bias: likewise.
        teachers: the reference; the loss of several is the mean of theirs.
        loss: of the run; says what duplicates are, and whether it learns from the teachers, too.
        config: how many are chosen.
        step: of the run, for batches that bring no draws.
        micro_batch_size: rows that a live reference encodes together; None for all.

    Returns:
        The chosen pairs of this rank; what the teachers say of them if the loss wants it; and, for
        the log, shares whose mean over ranks is the value: curation_share of the pairs that train,
        and the mean learnability of those (curation_learnability) and of all
        (curation_learnability_all).

    Raises:
        UserError: as ``size_of``, or as ``Teachers.features_of``.
    """
    image, text = encode(batch)
    # Autocast keeps weights that it has cast. Older PyTorch gives the step those of here, which
    # have no way back to the parameters.
    torch.clear_autocast_cache()
    said = teachers.features_of(batch, micro_batch_size)
    rows = len(image)
    learner = TeacherFeatures(
        image, text, (image.shape[1],), (logit_scale.item(),), (logit_bias.item(),)
    )
    reference = said._replace(image=said.image.to(image), text=said.text[:rows].to(text))
    ids = ids_for(loss, batch.caption_ids, batch.picture_ids)
    scores = LearnabilityScores(
        learner,
        reference,
        join_ids(ids.get("caption_ids"), ids.get("picture_ids")),
        duplicates_of(loss) or "negative",
    )
    draws = draws_of(batch, step)
    noise = torch.stack(
        [uniform(draws, _FIRST_STREAM + chunk) for chunk in range(config.chunks)], dim=1
    )
    group = resolve_group(None)
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    total = int(gather_rows(torch.tensor([rows], device=image.device)).sum())
    size = config.size_of(total, world_size)
    choice = choose_learnable(scores, noise, size)
    share = size // world_size
    own = choice.positions[rank * share : (rank + 1) * share]
    fields = {name: field for name, field in batch._asdict().items() if field is not None}
    # What stored features stand in for is empty.
    columns = {name: field for name, field in fields.items() if field[:1].numel()}
    wanted = list(columns.values())
    sends_teachers = uses_teachers(loss) and len(said.text) == rows
    if sends_teachers:
        wanted += [said.image, said.text]
    fetched = fetch_rows(wanted, own)
    empty = {name: field[:share] for name, field in fields.items() if name not in columns}
    chosen = batch._replace(**dict(zip(columns, fetched, strict=False)), **empty)
    told: TeacherFeatures | None = None
    if sends_teachers:
        told = said._replace(image=fetched[-2], text=fetched[-1])
    elif uses_teachers(loss):  # stored rows for several captions, which the batch brings
        told = teachers.features_of(chosen, micro_batch_size)
    learnability = scores.own.to(torch.float32)
    per_rank = world_size * learnability
    terms = {
        "curation_share": learnability.new_tensor(size / total),
        "curation_learnability": (per_rank * choice.is_chosen).sum() / size,
        "curation_learnability_all": per_rank.sum() / total,
    }
    return chosen, told, terms
