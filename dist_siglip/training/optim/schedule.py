"""What share of the highest learning rate does a step use?"""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule = "cosine",
    min_fraction: float = 0.0,
    cooldown_steps: int = 0,
) -> float:
    """Share of the highest learning rate that a step uses.

    With w warm-up steps, c cool-down steps, T steps in all, m = min_fraction,
    p = (step - w) / (T - w) and q = (step - (T - c)) / c, kept in [0, 1]:

        step < w:  (step + 1) / w
        cosine:    m + (1 - m) * (1 + cos(pi * p)) / 2
        linear:    m + (1 - m) * (1 - p)
        constant:  1 up to step T - c, then m + (1 - m) * (1 - q)

    Args:
        step: number of optimizer steps already taken, from 0.
        warmup_steps: w; if it is T or more, the run ends inside the warm-up.
        total_steps: T; from step T on the value stays at its end.
        schedule: one of "cosine", "linear", "constant".
        min_fraction: m, in [0, 1].
        cooldown_steps: c, of the constant schedule; 0 stays constant to the end.

    Returns:
        A number in [0, 1].

    Example:
        >>> steps = (0, 1, 2, 6, 10, 11)
        >>> [round(learning_rate_factor(s, warmup_steps=2, total_steps=10), 3) for s in steps]
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
        >>> cooled = dict(warmup_steps=0, total_steps=10, schedule="constant", cooldown_steps=4)
        >>> [learning_rate_factor(step, **cooled) for step in (5, 6, 8, 10)]
        [1.0, 1.0, 0.5, 0.0]

    Source:
        Warm-up, cosine and constant with cool-down as in open_clip's ``scheduler.py``
        (``cosine_lr``, ``const_lr_cooldown`` with power 1), for m = 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        since = step - (total_steps - cooldown_steps)
        remaining = 1 - min(since / cooldown_steps, 1.0) if cooldown_steps and since > 0 else 1.0
    else:
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return min_fraction + (1 - min_fraction) * remaining
