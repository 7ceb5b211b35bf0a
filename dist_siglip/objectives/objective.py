"""What an objective is: a weight that may begin late, heads of its own, and sums over rows.

The pairwise loss reads features of the whole batch; an objective reads one row at a time, so that
tokens never leave the micro-batch that made them. It returns a sum and a count for each of its
terms. Whoever trains adds, on each rank of W,

    weight(step) * W * sum / (count of all ranks)

whose mean over ranks is the mean over the global batch, whatever the local batches are.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, TokenShape

Need = Literal["image tokens", "captions", "regions", "global view", "local views", "masked view"]


class Regions(NamedTuple):
    """A region of each picture.

    Attributes:
        texts: (b, L) int64, token ids of what it shows.
        boxes: (b, 4), its top, left, bottom, right in shares of the image; 0 where there is none.
    """

    texts: Tensor
    boxes: Tensor

    @property
    def exist(self) -> Tensor:
        """(b,) bool; False where a picture has none."""
        return self.boxes[:, 2] > self.boxes[:, 0]


class Targets(NamedTuple):
    """What a teacher says of some rows, and what turns it into probabilities.

        p_n = softmax((prototypes y_n - centre) / temperature)

    Attributes:
        rows: (b, R, D), y: R vectors of length 1 of each picture.
        prototypes: (K, D), of length 1.
        centre: (K,).
        temperature: > 0.
    """

    rows: Tensor
    prototypes: Tensor
    centre: Tensor
    temperature: float


class Rows(NamedTuple):
    """Some rows of a batch; row i of every field belongs to pair i.

    Attributes:
        tokens: (b, T, C), patches behind the last norm of the image tower.
        texts: (b, L) int64, token ids of the captions.
        draws: (b,) int64 >= 0, random numbers of seed, epoch and position; see ``uniform``.
        valid: (b,) bool; False where the row must not count.
        regions: of the pictures; None where the data have none.
        token_mask: (b, T) bool, False at tokens of padding, of pictures of any shape (NaFlex); None
            where there is no padding.
        local_views: (b, V, C), pooled vectors of small crops; None where nobody needs them.
        masked_tokens: (b, T, C), patches of the global view, of which some were hidden; likewise.
        mask: (b, T) bool, which of them.
        targets: by name of the objective, what a teacher says of the global view.
    """

    tokens: Tensor
    texts: Tensor
    draws: Tensor
    valid: Tensor
    regions: Regions | None = None
    token_mask: Tensor | None = None
    local_views: Tensor | None = None
    masked_tokens: Tensor | None = None
    mask: Tensor | None = None
    targets: Mapping[str, Targets] = {}


class Term(NamedTuple):
    """A sum over rows, whose mean over all rows of all ranks is meant.

    Attributes:
        total: (), the sum, with its gradient.
        number: (), of rows that were summed, without one.
    """

    total: Tensor
    number: Tensor


class Objective(nn.Module):
    """A term beside the pairwise loss.

    A subclass says in ``needs`` what it reads, makes its heads in ``build``, and returns terms from
    ``forward``. Its parameters train with the run's optimizer and lie in checkpoints; they are no
    part of the towers, so exports, embeddings and evaluations of the model do not have them.

    Args:
        weight: factor of its terms, >= 0; at 0 it is not computed.
        start: steps before it begins; below 1 a share of ``trainer.max_steps``, or of
            ``optim.schedule_steps`` if that is given. Before that it is not computed, and its heads
            stay as they were built.
        ramp_steps: steps over which the weight then rises, by equal parts.

    Raises:
        UserError: if a number is out of range.
    """

    name: ClassVar[str] = "objective"
    needs: frozenset[Need] = frozenset()
    # Whether it leaves out tokens of padding (``Rows.token_mask``); if not, NaFlex is refused.
    takes_padding: ClassVar[bool] = False

    def __init__(self, weight: float = 1.0, start: float = 0.0, ramp_steps: int = 0) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("start", start), ("ramp_steps", ramp_steps)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} ({value}) of {type(self).__name__} must be 0 or above")
        self.weight, self.start, self.ramp_steps = weight, start, ramp_steps

    def check_pictures(self, built: BuiltModel) -> None:
        """Refuse pictures of any shape, unless padding is left out.

        Raises:
            UserError: if the image tower takes such, and the objective does not.
        """
        if built.patches is not None and not self.takes_padding:
            raise UserError(
                f"objectives ({type(self).__name__}) take pictures of one size, and those of this "
                "image tower have any shape (NaFlex); leave it out, or set model.image_size in "
                "place of num_patches"
            )

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make the heads.

        Args:
            built: towers and tokenizer.
            image: patch tokens of the image tower.
        """

    def forward(self, rows: Rows) -> dict[str, Term]:
        """Return the terms of some rows by name, those of the log; equal names for all rows."""
        raise NotImplementedError

    def measure(self, rows: Rows) -> dict[str, Term]:
        """Return what an evaluation logs of some rows, by name; by default the terms."""
        return {name: Term(*term) for name, term in self(rows).items()}

    def compile_heads(self, backend: str) -> None:
        """Let ``torch.compile`` translate what is worth it, in place; by default nothing."""

    def weight_at(self, step: int, max_steps: int) -> float:
        """Return the weight of a step, counted from 0.

        Raises:
            UserError: if ``start`` is a share, and ``max_steps`` is not known.

        Example:
            >>> objective = Objective(2.0, start=0.5, ramp_steps=4)
            >>> [objective.weight_at(step, 10) for step in (4, 5, 6, 9)]
            [0.0, 0.5, 1.0, 2.0]
        """
        start = self.first_step(max_steps)
        if step < start:
            return 0.0
        ramp = max(self.ramp_steps, 1)
        return self.weight * min((step - start + 1) / ramp, 1.0)

    def first_step(self, max_steps: int) -> int:
        """Return the first step, counted from 0, in which the weight is above 0.

        Raises:
            UserError: as ``weight_at``.
        """
        start = self.start
        if 0 < start < 1:
            if max_steps < 1:
                raise UserError(
                    f"start ({start}) of {type(self).__name__} is a share of trainer.max_steps "
                    f"({max_steps}), which must be at least 1; or give start in steps"
                )
            start = round(start * max_steps)
        return math.ceil(start)


def uniform(draws: Tensor, stream: int) -> Tensor:
    """Turn random integers into uniform numbers of a stream, on any device alike.

    Args:
        draws: (b,) int64.
        stream: >= 0; numbers of two streams have nothing to do with each other.

    Returns:
        (b,) float32 in [0, 1).

    Example:
        >>> uniform(torch.tensor([1, 2]), 0).tolist() == uniform(torch.tensor([1, 2]), 0).tolist()
        True

    Source:
        The finalizer of SplitMix64 (Steele et al. 2014, OOPSLA), in signed arithmetic.
    """
    start = ((stream + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    mixed = draws + start
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 40).to(torch.float32) * 2.0**-24


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
