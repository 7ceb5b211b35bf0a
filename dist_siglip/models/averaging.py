"""Averages of weights: between a start and its run (WiSE-FT), and of several runs (soups).

Towers are mixed entry by entry in float64; the scale in its logarithm, as it is trained, the bias
as it is. A weight of 0 leaves an ingredient out, one of 1 returns it bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.system.atomic import write_atomically


class Ingredient(NamedTuple):
    """One set of weights.

    Attributes:
        name: for errors and tables.
        tensors: of the towers, by open_clip's names, without scale and bias.
        logit_scale: multiplier; None if it is not known.
        logit_bias: added to the logits; None if it is not known.
    """

    name: str
    tensors: dict[str, Tensor]
    logit_scale: float | None
    logit_bias: float | None


def average_weights(ingredients: Sequence[Ingredient], weights: Sequence[float]) -> Ingredient:
    """Mix weights of one architecture: theta = sum_k w_k theta_k.

    Tensors of whole numbers (counters) are those of the last ingredient that counts. Scale and bias
    are mixed if all ingredients that count have them.

    Args:
        ingredients: at least one.
        weights: >= 0, one each; they must sum to 1.

    Raises:
        UserError: if a weight is out of range, or an ingredient is of another architecture.

    Example:
        >>> a, b = (Ingredient(str(v), {"w": torch.tensor([v])}, v, -v) for v in (1.0, 4.0))
        >>> mixed = average_weights([a, b], [0.5, 0.5])
        >>> mixed.tensors["w"].item(), round(mixed.logit_scale, 6), mixed.logit_bias
        (2.5, 2.0, -2.5)

    Source:
        Wortsman et al., arXiv:2109.01903 (WiSE-FT) and arXiv:2203.05482 (soups).
    """
    is_share = all(0 <= weight <= 1 for weight in weights)
    if not is_share or not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise UserError(f"weights ({list(weights)}) must be numbers from 0 to 1 that sum to 1")
    for each in ingredients[1:]:
        _refuse_another_architecture(ingredients[0], each)
    counting = [(e, w) for e, w in zip(ingredients, weights, strict=True) if w > 0]
    name = " + ".join(f"{weight:.4g} * {each.name}" for each, weight in counting)
    if len(counting) == 1:
        return counting[0][0]._replace(name=name)
    tensors = {}
    for key, first in ingredients[0].tensors.items():
        if not first.is_floating_point():
            tensors[key] = counting[-1][0].tensors[key].clone()
            continue
        total = torch.zeros(first.shape, dtype=torch.float64)
        for each, weight in counting:
            total.add_(each.tensors[key].double(), alpha=weight)
        tensors[key] = total.to(first.dtype)
    refuse_not_finite(tensors, "the average")
    scales = [(each.logit_scale, weight) for each, weight in counting]
    biases = [(each.logit_bias, weight) for each, weight in counting]
    scale = None
    if all(value is not None for value, _ in scales):
        scale = math.exp(sum(weight * math.log(value) for value, weight in scales if value))
    bias = None
    if all(value is not None for value, _ in biases):
        bias = sum(weight * value for value, weight in biases if value is not None)
    return Ingredient(name, tensors, scale, bias)


def _refuse_another_architecture(first: Ingredient, other: Ingredient) -> None:
    """Name the first tensor in which two ingredients differ."""
    for key in sorted({*first.tensors, *other.tensors}):
        sizes = [
            tuple(each.tensors[key].shape) if key in each.tensors else "missing"
            for each in (first, other)
        ]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{other.name} is of another architecture than {first.name}: {key} is {sizes[1]} "
                f"and was {sizes[0]}; average weights of one model"
            )


class Soup(NamedTuple):
    """An average and how it came about.

    Attributes:
        average: the weights.
        kept: names of the ingredients in it.
        tried: names and measures in the order in which they were tried: of each alone, then of the
            average with each.
    """

    average: Ingredient
    kept: list[str]
    tried: list[tuple[str, float]]


def greedy_soup(ingredients: Sequence[Ingredient], measure: Callable[[Ingredient], float]) -> Soup:
    """Add ingredients to a uniform average, best first, as long as the measure does not fall.

    Args:
        ingredients: at least one.
        measure: of an average; the higher, the better.

    Example:
        >>> one, two, bad = (
        ...     Ingredient(str(v), {"w": torch.tensor([v])}, None, None) for v in (1.0, 3.0, 9.0))
        >>> soup = greedy_soup([bad, one, two], lambda each: -abs(each.tensors["w"].item() - 2))
        >>> soup.kept, soup.average.tensors["w"].item()
        (['1.0', '3.0'], 2.0)

    Source:
        Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    alone = [(measure(each), each) for each in ingredients]
    tried = [(each.name, value) for value, each in alone]
    ordered = sorted(alone, key=lambda pair: -pair[0])
    (best, first), kept = ordered[0], [ordered[0][1]]
    average = first
    for _, each in ordered[1:]:
        several = [*kept, each]
        candidate = average_weights(several, [1 / len(several)] * len(several))
        value = measure(candidate)
        tried.append((f"with {each.name}", value))
        if value >= best:
            best, average, kept = value, candidate, several
    return Soup(average, [each.name for each in kept], tried)


def write_weights(path: Path, weights: Ingredient) -> None:
    """Write a safetensors file that ``pretrained`` takes, whole.

    Raises:
        UserError: if the file exists or cannot be written.
    """
    if path.exists():
        raise UserError(f"out ({path}) exists; name another file")
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.tensors.items()}
    if weights.logit_scale is not None:
        tensors["logit_scale"] = torch.tensor(math.log(weights.logit_scale))
    if weights.logit_bias is not None:
        tensors["logit_bias"] = torch.tensor(weights.logit_bias)
    try:
        write_atomically(path, save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise UserError(f"out ({path}) cannot be written: {error.strerror or error}") from error
