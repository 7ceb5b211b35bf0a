"""Prefixes of features: cut, made of length 1 again, and the way of their gradients back.

What a loss at prefixes needs besides its tiles: the settings of all prefixes, and a visit of a
shard that lets the pass of every prefix see its own columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import FiniteCheck, Nonfinite, check_pairs, tile_shape_of
from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel
from dist_siglip.losses.kernels.tiles import logits_dtype
from dist_siglip.losses.ring_pass import RingPass, Shard


def check_dims(dims: Sequence[int], width: int | None = None) -> tuple[int, ...]:
    """Return prefixes from the largest to the smallest.

    Args:
        dims: columns of each prefix.
        width: of the features; None where it is not known yet.

    Raises:
        UserError: if there is none, one occurs twice, or one is below 1 or above ``width``.

    Example:
        >>> check_dims([2, 8, 4], 8)
        (8, 4, 2)
    """
    ordered = tuple(sorted(dims, reverse=True))
    if not ordered or len(set(ordered)) < len(ordered) or ordered[-1] < 1:
        raise UserError(
            f"dims ({list(dims)}) must be different numbers of columns, each at least 1, like "
            "[768, 384, 192]"
        )
    if width is not None and ordered[0] > width:
        raise UserError(
            f"dims ({list(dims)}): a prefix of {ordered[0]} columns is more than the {width} that "
            f"features have; name dims of at most {width}"
        )
    return ordered


class Prefix(NamedTuple):
    """First columns of features, every row of length 1.

    Attributes:
        unit: (B, d), in the dtype of the features.
        lengths: (B, 1), of the rows before; None where all columns stay, as they are.
    """

    unit: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, features: Tensor, dim: int) -> "Prefix":
        """Cut features (B, D) to ``dim`` columns; a row of zeros stays zero."""
        if dim == features.shape[1]:
            return cls(features, None)
        cut = features[:, :dim].to(logits_dtype(features))
        lengths = cut.norm(dim=1, keepdim=True)
        return cls((cut / _above_zero(lengths)).to(features.dtype), lengths)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient by the columns that were cut, from that by ``unit``."""
        if self.lengths is None:
            return gradient
        unit = self.unit.to(gradient.dtype)
        tangent = gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit
        return torch.where(self.lengths > 0, tangent / _above_zero(self.lengths), 0)


def _above_zero(lengths: Tensor) -> Tensor:
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


class PrefixSettings(NamedTuple):
    """What a loss at prefixes computes, and how.

    ``shares`` sum to 1; scale and bias have one element for each prefix.
    """

    dims: tuple[int, ...]
    shares: tuple[float, ...]
    scales: Tensor
    biases: Tensor | None
    tile_shape: tuple[int, int]
    kernel: Kernel
    nonfinite: Nonfinite
    finite_check: FiniteCheck | None
    exchange: ExchangeName
    group: ProcessGroup | None

    def named(self, image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        """What must be finite."""
        found = {
            "image_features": image_features.detach(),
            "text_features": text_features.detach(),
            "logit_scale": _smallest(self.scales),
        }
        return found if self.biases is None else {**found, "logit_bias": _smallest(self.biases)}

    def shared(self) -> dict[str, Tensor]:
        """Numbers that ranks compare."""
        found = {"logit_scale": self.scales.detach().mean()}
        return (
            found if self.biases is None else {**found, "logit_bias": self.biases.detach().mean()}
        )

    def factors(self) -> list[Tensor]:
        """What turns the gradients of each prefix into those of the loss: weight times scale."""
        return [s * scale for s, scale in zip(self.shares, self.scales.detach(), strict=True)]

    def purpose(self, kind: str, more: str) -> str:
        """What ranks must agree on."""
        return f"{kind} at prefixes; dims {self.dims}; weights {self.shares}; {more}"


def _smallest(values: Tensor) -> Tensor:
    """Return the smallest element, (); not a number if any is not finite."""
    values = values.detach()
    return torch.where(values.isfinite().all(), values.min(), torch.nan)


def weighted(parts: Sequence[Tensor | None], shares: Tensor) -> Tensor | None:
    """Return the gradients of the scalars of K prefixes, (K,); None if they are not wanted."""
    known = [part for part in parts if part is not None]
    return torch.stack(known) * shares if known else None


def visit_prefixes(
    passes: Sequence[RingPass],
    dims: Sequence[int],
    factors: Sequence[Tensor],
    owner: int,
    rows: Tensor,
    more: Sequence[Shard],
    total: Tensor | None,
) -> None:
    """Let every pass visit its prefix of a shard; put their sum in ``total``, (rows, D)."""
    if total is not None:
        total.zero_()
    for each, dim, factor, others in zip(passes, dims, factors, more, strict=True):
        prefix = Prefix.of(rows, dim)
        if total is None:
            each.visit(owner, (prefix.unit, *others), ())
            continue
        added = total.new_empty(len(rows), dim)
        each.visit(owner, (prefix.unit, *others), (added,))
        total[:, :dim] += prefix.pull_back(added) * factor


def sum_at_home(
    passes: Sequence[RingPass], homes: Sequence[Prefix], factors: Sequence[Tensor], home: Tensor
) -> Tensor | None:
    """Sum the gradients of the rows at home over the prefixes, (B, D); None if there are none."""
    total = torch.zeros_like(home, dtype=logits_dtype(home))
    for each, prefix, factor in zip(passes, homes, factors, strict=True):
        if each.home_gradient is None:
            return None
        total[:, : prefix.unit.shape[1]] += prefix.pull_back(each.home_gradient) * factor
    return total


def prefix_settings(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None,
    nonfinite: Nonfinite,
    finite_check: FiniteCheck | None,
    exchange: ExchangeName,
    group: ProcessGroup | None,
    chunk_rows: int | None,
    kernel: Kernel,
) -> PrefixSettings:
    """Check the arguments that losses at prefixes share; see ``matryoshka_sigmoid_loss``."""
    check_pairs(image_features, text_features)
    ordered = check_dims(dims, image_features.shape[1])
    dtype = logits_dtype(image_features)
    scales = _for_each("logit_scale", logit_scale, len(ordered), dtype)
    biases = None
    if logit_bias is not None:
        biases = _for_each("logit_bias", logit_bias, len(ordered), dtype)
    return PrefixSettings(
        ordered,
        prefix_shares(dims, weights),
        scales,
        biases,
        tile_shape_of(chunk_rows, image_features.device),
        choose_kernel(kernel, image_features),
        nonfinite,
        finite_check,
        exchange,
        group,
    )


def prefix_shares(dims: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Return weights that sum to 1, in the order of ``check_dims``; None is 1 each."""
    given = [1.0] * len(dims) if weights is None else list(weights)
    is_finite = all(0 <= weight < float("inf") for weight in given)
    if len(given) != len(dims) or not is_finite or not sum(given) > 0:
        raise UserError(
            f"weights ({given}) must be {len(dims)} finite numbers, one for each of dims "
            f"({list(dims)}), 0 or above and not all 0"
        )
    by_dim = dict(zip(dims, given, strict=True))
    return tuple(by_dim[dim] / sum(given) for dim in check_dims(dims))


def _for_each(name: str, value: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return one element for each prefix, (K,), with the graph of ``value``."""
    if not isinstance(value, Tensor) or value.numel() not in (1, count):
        raise UserError(
            f"{name} must be a tensor with one element, or one for each of {count} dims"
        )
    return value.reshape(-1).to(dtype).expand(count)
