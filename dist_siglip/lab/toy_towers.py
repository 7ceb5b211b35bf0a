"""Training of two small encoders on noisy views of the same vectors.

Every sample is a Gaussian vector. Each tower, a perceptron of its own, sees it through noise of
its own; without noise both see exactly the same, and "image" and "text" are names only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.losses import LogitScaleBias

_INPUT_WIDTH, _HIDDEN_WIDTH = 64, 256
# Loss of (image_features, text_features, logit_scale, logit_bias).
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A training of two towers.

    Args:
        dimension: D of the features.
        num_samples: size of the training set; 0 draws new samples at every step.
        noise: standard deviation of what each tower sees besides the sample.
        batch_size: pairs of a step.
        steps: of training.
        learning_rate: of Adam.
        learning_rate_end: share of it that is left at the end of a cosine; 1 keeps it constant.
        seed: of the towers, the samples and their order.
    """

    dimension: int = 32
    num_samples: int = 1024
    noise: float = 0.0
    batch_size: int = 64
    steps: int = 3000
    learning_rate: float = 1e-3
    learning_rate_end: float = 1.0
    seed: int = 0


class Trained(NamedTuple):
    """Result of a training.

    Attributes:
        image_features: (N, D), L2-normalised, of the samples asked for.
        text_features: (N, D).
        first_loss: of the first batch, before any step.
        logit_scale: at the end.
        logit_bias: at the end.
    """

    image_features: Tensor
    text_features: Tensor
    first_loss: float
    logit_scale: float
    logit_bias: float


def train_toy(
    toy: Toy,
    loss: PairLoss,
    logits: LogitScaleBias,
    *,
    num_unseen: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train both towers, and embed the training samples, or samples they have not seen.

    Example:
        >>> from dist_siglip.losses import ClipLoss
        >>> logits = LogitScaleBias(100.0, 0.0, train_scale=False, train_bias=False)
        >>> features = train_toy(Toy(steps=2), ClipLoss(), logits).image_features
        >>> features.shape
        torch.Size([1024, 32])
    """
    generator = torch.Generator().manual_seed(toy.seed)
    with torch.random.fork_rng():
        torch.manual_seed(toy.seed)
        towers = [_tower(toy.dimension) for _ in range(2)]
    samples = torch.randn(toy.num_samples, _INPUT_WIDTH, generator=generator)
    unseen = torch.randn(num_unseen, _INPUT_WIDTH, generator=generator)
    unseen_views = [_add_noise(unseen, toy.noise, generator) for _ in towers]
    parameters = [parameter for tower in towers for parameter in tower.parameters()]
    parameters += [parameter for parameter in logits.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=toy.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, toy.steps, eta_min=toy.learning_rate * toy.learning_rate_end
    )
    first_loss = 0.0
    for step in range(toy.steps):
        if toy.num_samples:
            chosen = torch.randperm(toy.num_samples, generator=generator)[: toy.batch_size]
            batch = samples[chosen]
        else:
            batch = torch.randn(toy.batch_size, _INPUT_WIDTH, generator=generator)
        images, texts = (
            F.normalize(tower(_add_noise(batch, toy.noise, generator)), dim=-1) for tower in towers
        )
        optimizer.zero_grad()
        value = loss(images, texts, *logits())
        value.backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            first_loss = value.item()
        if progress is not None and ((step + 1) % 50 == 0 or step + 1 == toy.steps):
            progress((step + 1) / toy.steps)
    with torch.no_grad():
        views = unseen_views if num_unseen else [samples, samples]
        images, texts = (
            F.normalize(tower(view), dim=-1) for tower, view in zip(towers, views, strict=True)
        )
        scale, bias = (value.item() for value in logits())
    return Trained(images, texts, first_loss, scale, bias)


def _tower(dimension: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(_INPUT_WIDTH, _HIDDEN_WIDTH),
        nn.ReLU(),
        nn.Linear(_HIDDEN_WIDTH, _HIDDEN_WIDTH),
        nn.ReLU(),
        nn.Linear(_HIDDEN_WIDTH, dimension),
    )


def _add_noise(samples: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not noise:
        return samples
    return samples + noise * torch.randn(samples.shape, generator=generator)
