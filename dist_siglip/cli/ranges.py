"""The range of every number that a command line or a YAML file takes, checked when it is read.

Parsers know types and nothing more: -1, nan, .inf or a number of four hundred digits would reach
the library, Lightning or PyTorch, after models were built or not before the first step. Here each
number has its range, by its dotted name; a test asks for one of every new setting. What depends on
several settings is checked where they meet.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from dist_siglip.errors import UserError


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may have; never nan or infinite.

    Attributes:
        low: smallest number.
        high: largest number.
        opens: "(" leaves out the low end, ")" the high end, "()" both.
        also: numbers outside that are allowed and mean something of their own.
    """

    low: float = -math.inf
    high: float = math.inf
    opens: str = ""
    also: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        """Whether a number is in the range.

        Example:
            >>> Range(0, 1, "(").holds(0), Range(0, 1, "(").holds(1), Range(0).holds(math.nan)
            (False, True, False)
        """
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if "(" in self.opens else value >= self.low
        below = value < self.high if ")" in self.opens else value <= self.high
        return (above and below) or value in self.also

    def __str__(self) -> str:
        """Write the range as the end of a sentence.

        Example:
            >>> print(Range(0, 1, ")"), "|", Range(1), "|", Range(0, opens="("), "|", Range())
            in [0, 1) | at least 1 | above 0 | a finite number
        """
        low, high = f"{self.low:.12g}", f"{self.high:.12g}"
        if math.isinf(self.low):
            text = "a finite number" if math.isinf(self.high) else f"at most {high}"
        elif math.isinf(self.high):
            text = f"above {low}" if "(" in self.opens else f"at least {low}"
        elif self.high >= _MOST:
            text = f"at least {low} and at most {high}"
        else:
            ends = "(" if "(" in self.opens else "[", ")" if ")" in self.opens else "]"
            text = f"in {ends[0]}{low}, {high}{ends[1]}"
        return text + "".join(f", or {special:g}" for special in self.also)


# More than any machine has of anything; fits the integers of C.
_MOST = 2**31 - 1
_FROM_0, _FROM_1, _FROM_2 = Range(0, _MOST), Range(1, _MOST), Range(2, _MOST)
_SEED = Range(0, 2**32 - 1)
_STEPS = Range(1, 10**12)
_NOT_NEGATIVE, _POSITIVE = Range(0), Range(0, opens="(")
_SHARE, _PART, _DECAY = Range(0, 1), Range(0, 1, "("), Range(0, 1, ")")
_PATCHES = Range(1, 65_535)
_MINUTES = Range(0, 1e6, "(")

_CACHE = {
    "max_gib": Range(0, 1e9, "("),
    "attempts": _FROM_1,
    "patience_seconds": Range(0, 1e9),
    "recheck_hours": Range(0, 1e9),
}
_TOWER = {
    "layer_decay": _PART,
    "learning_rate_factor": _POSITIVE,
    "unlocked_groups": _FROM_0,
    "weight_decay": _NOT_NEGATIVE,
}
_OPTIM = {
    "learning_rate": _POSITIVE,
    "beta1": _DECAY,
    "beta2": _DECAY,
    "epsilon": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": Range(0, 10**12),
    "cooldown_steps": Range(0, 10**12),
    "min_learning_rate_fraction": _SHARE,
    "schedule_start_step": Range(0, 10**12),
    "schedule_steps": _STEPS,
    "fallback_learning_rate": _POSITIVE,
}
# A share of all batches, or a number of them.
_BATCHES = Range(0, _MOST)

# Settings of fit, validate, test, calibrate and rerank.
_RUN: dict[str, Range] = {
    "seed_everything": _SEED,
    "data.seed": _SEED,
    "data.global_batch_size": _FROM_1,
    "data.val_local_batch_size": _FROM_1,
    "data.block_shards": _FROM_1,
    "data.max_bad_fraction": _SHARE,
    "data.captions.num_negatives": _FROM_1,
    "data.captions.weights": _POSITIVE,
    "data.captions.probabilities": _SHARE,
    "data.max_image_pixels": Range(1, 2**62),
    "data.intensity_window": Range(),
    "data.prefetch_factor": _FROM_1,
    "data.workers_per_rank": _FROM_0,
    "data.regions.min_left": _PART,
    "data.regions.min_score": Range(),
    "data.train_crop_scale": _PART,
    "data.datacompdr.dims": _FROM_1,
    "data.datacompdr.picture_size": Range(1, 65_536),
    "data.datacompdr.synthetic_share": _SHARE,
    "data.sequence_lengths": _PATCHES,
    "data.length_weights": _NOT_NEGATIVE,
    "data.train_sources.weight": _POSITIVE,
    **{f"data.cache.{name}": allowed for name, allowed in _CACHE.items()},
    "model.global_batch_size": _FROM_1,
    "model.image_size": Range(1, 65_536),
    "model.context_length": Range(2, _MOST),
    "model.kept_positions": _FROM_0,
    "model.patch_dropout": _DECAY,
    "model.teacher_momentum": _DECAY,
    "model.prefix_dims": _FROM_1,
    "model.curation.chunks": _FROM_1,
    "model.curation.filter_ratio": Range(0, 1, "()"),
    "model.teachers.bias": Range(),
    "model.teachers.dim": _FROM_1,
    "model.teachers.scale": _POSITIVE,
    "model.calibration_pairs": _FROM_2,
    "model.micro_batch_size": _FROM_1,
    "model.micro_batch_patches": _FROM_1,
    "model.num_patches": _PATCHES,
    "model.logits.start_scale": _POSITIVE,
    "model.logits.start_bias": Range(),
    **{f"model.optim.{name}": allowed for name, allowed in _OPTIM.items()},
    **{f"model.image_tower.{name}": allowed for name, allowed in _TOWER.items()},
    **{f"model.text_tower.{name}": allowed for name, allowed in _TOWER.items()},
    "model.candidates": _FROM_1,
    "model.easy_negatives": _FROM_0,
    "model.hard_negatives": _FROM_1,
    "model.pairs_per_pass": _FROM_1,
    "model.head.dropout": _DECAY,
    "model.head.heads": _FROM_1,
    "model.head.layers": _FROM_1,
    "model.head.width": _FROM_1,
    "model.head.rerank_weight": _POSITIVE,
    "benchmarks.every_steps": _STEPS,
    "checkpoint.every_steps": _STEPS,
    "checkpoint.keep": _FROM_1,
    "checkpoint.allowed_misses": _FROM_0,
    "collapse_alarm.logit_separation": _POSITIVE,
    "collapse_alarm.rank_share": Range(0, 1, "()"),
    "collapse_alarm.recall_errors": _POSITIVE,
    "suite_batch_size": _FROM_1,
    "suite_workers": _FROM_0,
    "step_guard.abort_after": _FROM_1,
    "step_guard.roll_back_after": _FROM_1,
    "step_guard.spike_factor": Range(1, opens="("),
    "step_guard.spike_window": Range(1, 1_000_000),
    "stop.agree_every_steps": _STEPS,
    "watchdog.collective_minutes": _MINUTES,
    "watchdog.slow_minutes": _MINUTES,
    "watchdog.stall_minutes": _MINUTES,
    "trainer.accumulate_grad_batches": _FROM_1,
    "trainer.check_val_every_n_epoch": _FROM_1,
    # A list names GPUs, from 0; a number counts them, and -1 takes all.
    "trainer.devices": Range(-1, _MOST),
    "trainer.fast_dev_run": _FROM_0,
    "trainer.gradient_clip_val": _NOT_NEGATIVE,
    "trainer.limit_predict_batches": _BATCHES,
    "trainer.limit_test_batches": _BATCHES,
    "trainer.limit_train_batches": _BATCHES,
    "trainer.limit_val_batches": _BATCHES,
    "trainer.log_every_n_steps": Range(0, 10**12),
    "trainer.max_epochs": Range(0, _MOST, also=(-1,)),
    "trainer.max_steps": Range(0, 10**12, also=(-1,)),
    "trainer.max_time": Range(0, 1e9),
    "trainer.min_epochs": _FROM_0,
    "trainer.min_steps": Range(0, 10**12),
    "trainer.num_nodes": _FROM_1,
    "trainer.num_sanity_val_steps": Range(0, _MOST, also=(-1,)),
    "trainer.overfit_batches": _BATCHES,
    "trainer.reload_dataloaders_every_n_epochs": _FROM_0,
    "trainer.val_check_interval": Range(0, 10**12, "("),
}
# Options of the other commands. A name that several share means the same in all of them.
_COMMANDS: dict[str, Range] = {
    **{f"cache.{name}": allowed for name, allowed in _CACHE.items()},
    "accumulator_bytes": Range(1, 16),
    "alpha": _SHARE,
    "at_once": _FROM_1,
    "block_shards": _FROM_1,
    "captions.num_negatives": _FROM_1,
    "captions.weights": _POSITIVE,
    "captions.probabilities": _SHARE,
    "chunk_rows": _FROM_1,
    "context_length": Range(2, _MOST),
    "cpus_per_gpu": _FROM_1,
    "crop_scale": _PART,
    "devices": _FROM_1,
    "dim": _FROM_1,
    "dimension": _FROM_1,
    "embed_dim": _FROM_1,
    "feature_bytes": Range(1, 16),
    "from_step": Range(0, 10**12),
    "global_batch_size": _FROM_1,
    "gpus_per_node": _FROM_1,
    "image_size": Range(1, 65_536),
    "jpeg_quality": Range(1, 95),
    "k": _FROM_1,
    "latency_us": _NOT_NEGATIVE,
    "host_us": _NOT_NEGATIVE,
    "intensity_window": Range(),
    "limit_seconds": Range(0, 1e9, "("),
    "lengths": _PATCHES,
    "local_batch_size": _FROM_1,
    "local_world_size": _FROM_1,
    "logit_bias": Range(),
    "logit_scale": _POSITIVE,
    "margin": Range(),
    "max_bad_fraction": _SHARE,
    "max_image_pixels": Range(1, 2**62),
    "max_requeues": _FROM_0,
    "max_shard_mib": _FROM_1,
    "million_parameters": Range(0, 1e7, "("),
    "nic_gb_s": _POSITIVE,
    "nodes": _FROM_1,
    "num_parts": _FROM_1,
    "num_patches": _PATCHES,
    "num_rows": _FROM_1,
    "num_shards": _FROM_1,
    "nvlink_gb_s": _POSITIVE,
    "pairs": Range(2),
    "pictures": _FROM_1,
    "port": Range(0, 65_535),
    "ranks": _FROM_1,
    "refit_for": _FROM_2,
    "relative_bias": Range(-1, 1),
    "resize_short_side": Range(1, 65_536),
    "rounds": _FROM_1,
    "sample": _FROM_1,
    "samples_per_shard": _FROM_1,
    "save_seconds": _FROM_1,
    "seconds": Range(0, 1e6, "("),
    "seed": _SEED,
    "shuffle_seed": _SEED,
    "steps": _STEPS,
    "svcca_dimensions": _FROM_1,
    "teraflops": _POSITIVE,
    "threads": _FROM_1,
    "timeout_seconds": Range(1, 1e6),
    "visits": _FROM_1,
    "warmup_steps": Range(0, 10**12),
    "workers": _FROM_0,
    "workers_per_rank": _FROM_0,
    "world_size": _FROM_1,
    "world_sizes": _FROM_1,
    "write_mib": _FROM_1,
}
# init_args of classes of this package that a class_path may name.
_INIT_ARGUMENTS: dict[str, Range] = {
    "alignment": _NOT_NEGATIVE,
    "bottleneck": _FROM_1,
    "box_bins": Range(2, 65_536),
    "brightness": _NOT_NEGATIVE,
    "c": _POSITIVE,
    "centre_momentum": _DECAY,
    "chunk_rows": _FROM_1,
    "contrast": _NOT_NEGATIVE,
    "cross_uniformity": _NOT_NEGATIVE,
    "decay": Range(0, 1, "()"),
    "digits_per_image": Range(2, 6),
    "dims": _FROM_1,
    "every_steps": _STEPS,
    "first_teacher_temperature": _POSITIVE,
    "gallery_images": _FROM_0,
    "global_batch_size": _FROM_1,
    "global_scale": _PART,
    "grey": _SHARE,
    "heads": _FROM_1,
    "hidden": _FROM_1,
    "hue": Range(0, 0.5),
    "ignore": Range(0, 65_535),
    "layers": _FROM_1,
    "line_seconds": Range(0, 1e9),
    "local_batch_size": _FROM_1,
    "local_scale": _PART,
    "local_size": _FROM_1,
    "local_views": _FROM_1,
    "magnitude": Range(0, 30),
    "max_bad_fraction": _SHARE,
    "max_image_pixels": Range(1, 2**62),
    "max_iterations": _FROM_1,
    "mined_negatives": Range(0, 65_536),
    "mined_weight": _POSITIVE,
    "most_captions": _FROM_1,
    "neighbors": _FROM_0,
    "num_ops": Range(1, 16),
    "parallel": _SHARE,
    "probability": _SHARE,
    "prototypes": _FROM_2,
    "ramp_steps": Range(0, 10**12),
    "seed": _SEED,
    "settings.bank_patches": _FROM_1,
    "settings.k": _FROM_1,
    "settings.local_batch_size": _FROM_1,
    "settings.ridge": _POSITIVE,
    "settings.seed": _SEED,
    "settings.temperature": _POSITIVE,
    "settings.workers_per_rank": _FROM_0,
    "saturation": _NOT_NEGATIVE,
    "share": _PART,
    "short_side": _FROM_1,
    "shots": _FROM_1,
    "rank": _FROM_0,
    "start": Range(0, 10**12),
    "start_step": Range(0, 10**12),
    "strength": Range(0, opens="("),
    "student_temperature": _POSITIVE,
    "teacher_temperature": _POSITIVE,
    "temperature": _POSITIVE,
    "temperature_steps": Range(0, 10**12),
    "test_pictures": _FROM_1,
    "top_k": _FROM_1,
    "train_pictures": _FROM_1,
    "uniformity": _NOT_NEGATIVE,
    "val_share": Range(0, 1, "()"),
    "weight": _NOT_NEGATIVE,
    "weights": _NOT_NEGATIVE,
    "width": _FROM_1,
    "world_size": _FROM_1,
}
RANGES = _RUN | _COMMANDS

_REMEDIES = {
    "trainer.gradient_clip_val": "0 or null turns clipping off",
    "data.cache.max_gib": "give what the disk has",
    "cache.max_gib": "give what the disk has",
}


def check_ranges(settings: Namespace) -> None:
    """Refuse the first number that is out of its range.

    Example:
        >>> check_ranges(Namespace(seed=0))
    """
    for place, value, is_own in _numbers(settings, "", True):
        key = re.sub(r"\[\d+\]", "", place)  # which of a list it is does not change its range
        allowed = range_of(_owner_of(key)) if is_own else None
        if allowed is not None and not allowed.holds(value):
            is_infinite = isinstance(value, float) and math.isinf(value)
            remedy = _REMEDIES.get(key)
            raise UserError(
                f"{place} ({_shorten(value)}) must be {allowed}"
                + (", and finite" if is_infinite else "")
                + (f"; {remedy}" if remedy else "")
            )


def range_of(key: str) -> Range | None:
    """Return the range of a setting by its dotted name; None if it has none.

    Example:
        >>> range_of("model.loss.init_args.chunk_rows") == range_of("chunk_rows")
        True
    """
    if ".init_args." in key:
        return _INIT_ARGUMENTS.get(key.rpartition(".init_args.")[2])
    return RANGES.get(key)


# Settings whose names below are a user's own, dots included.
_BY_NAME = re.compile(r"((?:.+\.)?captions\.(?:weights|probabilities))\..+")


def _owner_of(key: str) -> str:
    """Return the setting that a number belongs to.

    Example:
        >>> _owner_of("data.captions.weights.seo.alt"), _owner_of("data.seed")
        ('data.captions.weights', 'data.seed')
    """
    found = _BY_NAME.fullmatch(key)
    return found.group(1) if found else key


def _numbers(value: Any, place: str, is_own: bool) -> Iterator[tuple[str, float, bool]]:
    """All numbers in a setting, by place, and whether they are this package's to judge."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value, is_own
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _numbers(each, f"{place}[{number}]", is_own)
    elif isinstance(value, Namespace | dict):
        fields = vars(value) if isinstance(value, Namespace) else value
        if "class_path" in fields:
            is_own = str(fields["class_path"]).startswith("dist_siglip.")
        for name, each in fields.items():
            yield from _numbers(each, f"{place}.{name}" if place else str(name), is_own)


def _shorten(value: float) -> str:
    try:
        text = str(value)
    except ValueError:  # Python writes no more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."
