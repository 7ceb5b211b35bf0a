"""Self-distillation and masked prediction on pictures of digits: views, student and teacher.

Objectives, teacher and the pass of a step are those of a run; views are cut from tensors here.
"""

import torch
from torch import Tensor

from dist_siglip.data import ImageTextBatch
from dist_siglip.models import BuiltModel
from dist_siglip.objectives import Targets, TeacherObjective
from dist_siglip.objectives.self_distillation import SelfDistillation
from dist_siglip.training.module.ema_teacher import EmaTeacher
from dist_siglip.training.module.encoding import encode_with_terms

TEACHER_MOMENTUM = 0.99  # a half-life of 69 steps
_BRIGHTNESS, _NOISE = (0.7, 1.2), 0.125  # of an augmented view; noise of normalised pixels


class SelfTaught:
    """An objective on views beside a training, and the average of the student it learns of.

    Args:
        objective: not built yet.
        built: the student's towers.
        seed: of the heads, and of all that is drawn.
        steps: of the training.
        crop_size: side of the small crops, in pixels.
    """

    def __init__(
        self,
        objective: TeacherObjective,
        built: BuiltModel,
        *,
        seed: int,
        steps: int,
        crop_size: int,
    ) -> None:
        self.objective, self.towers = objective, built.encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            objective.build(built, self.towers.image_token_shape(built.image_size))
        self._by_name = {objective.name: objective}
        self.teacher = EmaTeacher(self.towers, self._by_name, TEACHER_MOMENTUM)
        self._generator = torch.Generator().manual_seed(seed)
        self._steps, self._crop_size = steps, crop_size
        self._seen: tuple[dict[str, Targets], Tensor] | None = None

    def encode(self, images: Tensor, texts: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Encode (B, 3, 16, 16) pictures; return their features and the weighted term, or 0."""
        name, objective = self.objective.name, self.objective
        weight = objective.weight_at(step, self._steps)
        if not weight:
            return self.towers.encode_image(images), images.new_zeros(())
        rows = torch.arange(len(images))
        views = _augmented(images, self._generator)
        local_views = None
        if isinstance(objective, SelfDistillation):
            crops = _crops(images, objective.views.local_views, self._crop_size, self._generator)
            local_views = _augmented(crops.flatten(0, 1), self._generator)
            local_views = local_views.unflatten(0, crops.shape[:2])
        batch = ImageTextBatch(
            images=images,
            texts=texts,
            caption_ids=rows,
            sample_ids=rows,
            valid=rows >= 0,
            substituted=rows < 0,
            draws=torch.randint(2**62, rows.shape, generator=self._generator),
            views=views,
            local_views=local_views,
        )
        assert batch.draws is not None
        self.teacher.begin(self.towers, self._by_name)
        since = step - objective.first_step(self._steps)
        targets = self.teacher.targets(
            self.towers,
            self._by_name,
            views,
            batch.draws,
            len(rows),
            {name: objective.temperature_at(since)},
        )
        features, terms = encode_with_terms(
            self.towers, self._by_name, batch, step, len(rows), targets=targets
        )
        term = terms[name][f"{name}_loss"]
        loss = term.total / term.number
        self._seen = targets, loss.detach()
        return features, weight * loss

    def follow(self) -> None:
        """Let the teacher take in a step of the optimizer, if it has begun."""
        if self._seen is not None:
            self.teacher.follow(self.towers, self._by_name, None)

    def gauges(self) -> dict[str, float]:
        """Return those of the teacher in the last step, by what is behind the objective's name."""
        if self._seen is None:
            return {}
        targets, loss = self._seen
        name = self.objective.name
        found = self.teacher.gauges(targets, {name: loss})
        return {key.removeprefix(f"{name}_"): float(value) for key, value in found.items()}


def _augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Another brightness of each picture, (N, 3, h, w), and the same noise in its colours."""
    least, most = _BRIGHTNESS
    factor = least + (most - least) * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = _NOISE * torch.randn(pictures[:, :1].shape, generator=generator)
    # Ink, of which pixels are (ink - 0.2) / 0.4, is multiplied.
    return pictures * factor + 0.5 * (factor - 1) + noise


def _crops(pictures: Tensor, number: int, size: int, generator: torch.Generator) -> Tensor:
    """(N, V, 3, size, size), cut at random places of (N, 3, H, W), not resized."""
    places = pictures.shape[-1] - size + 1
    top, left = (
        torch.randint(places, (len(pictures), number), generator=generator) for _ in range(2)
    )
    windows = pictures.unfold(2, size, 1).unfold(3, size, 1)
    return windows[torch.arange(len(pictures))[:, None], :, top, left]
