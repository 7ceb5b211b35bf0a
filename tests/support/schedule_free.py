"""A small optimizer that needs train() and eval(), like those of the package schedulefree."""

import torch
from torch.optim import Optimizer


class ScheduleFreeSGD(Optimizer):
    """Defazio et al. 2024, arXiv:2405.15682: y = (1 - b) z + b x, x averages z with 1 / t.

    In training the parameters are y, where gradients are taken; in evaluation they are x.
    """

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "steps": 0, "in_training": False})

    def _move(self, weight_of):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight_of(group["momentum"]))

    @torch.no_grad()
    def train(self):
        if not self.param_groups[0]["in_training"]:
            self._move(lambda momentum: 1 - momentum)
        for group in self.param_groups:
            group["in_training"] = True

    @torch.no_grad()
    def eval(self):
        if self.param_groups[0]["in_training"]:
            self._move(lambda momentum: 1 - 1 / momentum)
        for group in self.param_groups:
            group["in_training"] = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            assert group["in_training"], "train() was not called"
            group["steps"] += 1
            share, beta = 1 / group["steps"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / beta)
                z.sub_(p.grad + group["weight_decay"] * p, alpha=group["lr"])
                x.lerp_(z, share)
                p.copy_(torch.lerp(z, x, beta))
        return loss
