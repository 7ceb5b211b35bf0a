"""How much retrieval does the sigmoid loss of random batches alone guarantee?

An item whose nearest neighbour is not its match lies in a pair that costs at least log 2: its own,
with a logit of at most 0, or one with another item, with a logit of at least 0. So wrong items
times log 2 cannot exceed the loss of all pairs. Nothing else is used, so the bound is weak: it
says nothing (0) as soon as a gallery has a loss of log 2 per pair.
"""

import math
from typing import NamedTuple

from dist_siglip.errors import UserError


class RetrievalGuarantee(NamedTuple):
    """What the loss guarantees.

    Attributes:
        recall: share of items found first, in either direction, that cannot be undercut; 0 if
            nothing is guaranteed.
        xi: loss of a batch in units of log 2.
        is_vacuous: whether nothing is guaranteed.
    """

    recall: float
    xi: float
    is_vacuous: bool


def retrieval_guarantee(loss: float, global_batch_size: int, num_pairs: int) -> RetrievalGuarantee:
    """Bound recall@1 from below by the mean loss of random batches.

        recall@1 >= 1 - N xi / (B (B - 1))      xi = B * loss / log 2

    with the loss summed over the pairs of a batch and divided by B, as everywhere in this package.
    It holds for any B up to N; of all B, the whole gallery gives the largest bound.

    Args:
        loss: expected loss of a batch, of ``expected_sigmoid_loss``; in it every other pair
            counts as negative, equal captions too.
        global_batch_size: B, pairs of the batches, from 2 to N.
        num_pairs: N, pairs of the gallery.

    Raises:
        UserError: if B is not from 2 to N, or the loss negative.

    Example:
        >>> round(retrieval_guarantee(0.01, 1000, 2000).recall, 3)
        0.971
        >>> retrieval_guarantee(3.0, 1000, 2000)[::2]
        (0.0, True)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Proposition 1, whose loss is the sum (not divided
        by B) and which states it for sqrt(N) < B < N.
    """
    if not 2 <= global_batch_size <= num_pairs:
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be from 2 to the number of pairs "
            f"({num_pairs}); evaluate more pairs, or bound by the loss of the whole gallery"
        )
    if not loss >= 0:
        raise UserError(f"loss ({loss}) must be at least 0")
    xi = global_batch_size * loss / math.log(2)
    recall = 1 - num_pairs * xi / (global_batch_size * (global_batch_size - 1))
    return RetrievalGuarantee(max(0.0, recall), xi, recall <= 0)
