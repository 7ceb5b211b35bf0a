"""Steps of self-distillation and masked prediction, with their teacher, on each rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_siglip.losses import LogitScaleBias, SigLipLoss
from dist_siglip.models import build_dual_encoder, encode_tower_in_micro_batches
from dist_siglip.objectives import MaskedPrediction, SelfDistillation
from dist_siglip.training.module.ema_teacher import EmaTeacher
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.objectives import (
    build_objectives,
    draws_of,
    weigh_terms,
)
from tests.support.objective_ranks import LAYOUTS, batch_of, on_ranks, rows_of

WEIGHTS = {"self_distillation": 0.7, "masked_prediction": 0.4}
TEMPERATURES = {"self_distillation": 0.05, "masked_prediction": 0.06}
SIZES = {"prototypes": 12, "hidden": 10, "bottleneck": 6}


def views_of(batch, seed=7, local_views=2, local_size=16):
    """The batch with views of random pixels beside it."""
    generator = torch.Generator().manual_seed(seed)
    count, dtype = len(batch.images), batch.images.dtype
    shapes = (count, 3, 32, 32), (count, local_views, 3, local_size, local_size)
    views, local = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return batch._replace(views=views, local_views=local)


def objectives_of(assignment="centre", **settings):
    """Both objectives with small heads."""
    common = {**SIZES, "assignment": assignment, **settings}
    return [SelfDistillation(local_views=2, local_size=16, **common), MaskedPrediction(**common)]


class Step(nn.Module):
    """Towers, loss, objectives and their teacher, as a training step joins them."""

    def __init__(self, model, micro_batch_size, world_size, variant):
        super().__init__()
        torch.manual_seed(1)
        built = build_dual_encoder(model)
        self.towers = built.encoder.train()
        assignment = "sinkhorn" if "sinkhorn" in variant else "centre"
        self.objectives = build_objectives(objectives_of(assignment), built)
        for parameter in self.objectives.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.teacher = EmaTeacher(self.towers, dict(self.objectives.items()), 0.75)
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for buffer in self.teacher.centres.buffers():
                buffer += 0.1 * torch.randn_like(buffer)
        self.logits, self.loss = LogitScaleBias(5.0, -2.0), SigLipLoss()
        self.micro_batch_size, self.world_size = micro_batch_size, world_size
        self.double()

    def forward(self, batch):
        size = self.micro_batch_size or len(batch.images)
        objectives = dict(self.objectives.items())
        targets = self.teacher.targets(
            self.towers, objectives, batch.views, draws_of(batch, 0), size, TEMPERATURES
        )
        images, terms = encode_with_terms(self.towers, objectives, batch, 0, size, targets=targets)
        texts = encode_tower_in_micro_batches(self.towers.encode_text, batch.texts, size)
        loss = self.loss(images, texts, *self.logits())
        share, logged = weigh_terms(terms, WEIGHTS, self.world_size)
        losses = {name: logged[f"train/{name}_loss"] for name in targets}
        self.logged = {**losses, **self.teacher.gauges(targets, losses)}
        return loss + share


def steps_of(rank, world_size, model, cases):
    """Gradients, loss, gauges, and the teacher behind the step, for each case.

    A case is a size of micro-batches, and "" for DDP, "shards" for FSDP2, with "sinkhorn" in place
    of centres, or "mean of this rank", which is broken.
    """
    sizes = LAYOUTS[world_size]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for micro_batch_size, variant in cases:
        step = Step(model, micro_batch_size, world_size, variant)
        wrapped = on_ranks(step, world_size, in_shards="shards" in variant)
        batch = rows_of(views_of(batch_of(sum(sizes))), rows)
        if variant == "mean of this rank":
            _centre_alone(step, batch)
        loss = wrapped(batch)
        loss.backward()
        step.teacher.follow(step.towers, dict(step.objectives.items()), None)
        if world_size > 1:
            dist.all_reduce(loss.detach_())
        found.append(
            {
                "loss": loss.detach() / world_size,
                **{f"logged {name}": value.detach() for name, value in step.logged.items()},
                **{
                    name: _whole(parameter.grad)
                    for name, parameter in step.named_parameters()
                    if parameter.requires_grad
                },
                **{
                    f"after {name}": _whole(value.detach()).clone()
                    for name, value in step.teacher.state_dict().items()
                },
            }
        )
    return found


def _centre_alone(step, batch):
    """Take the mean of this rank's rows for that of all, which is broken."""
    teacher = step.teacher
    own = teacher.targets

    def targets(*args):
        found = own(*args)
        teacher._means = {
            name: (each.prototypes @ each.rows.mean(dim=(0, 1)), teacher._means[name][1])
            for name, each in found.items()
        }
        return found

    teacher.targets = targets


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
