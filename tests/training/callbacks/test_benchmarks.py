"""When benchmarks run beside validations, with which weights, and what they leave."""

import json
import logging
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.evaluation import Benchmark, BenchmarkResult
from dist_siglip.training.callbacks import Benchmarks, Watchdog
from tests.support.shards import tiny_inputs


class Mean(Benchmark):
    """The mean feature of one picture, and the scale."""

    task = "mean"

    def evaluate(self, model, *, group=None):
        features = model.encode_image(torch.ones(1, 3, 2, 2))
        return BenchmarkResult({"mean": float(features.mean()), "scale": model.logit_scale}, {})


class Towers(nn.Module):
    """Multiplies pictures by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return pixels.mean(dim=(2, 3)) * self.weight


class Precision:
    """Counts how often the towers ran inside of its context."""

    def __init__(self):
        self.entered = 0

    @contextmanager
    def forward_context(self):
        self.entered += 1
        yield


@pytest.fixture
def world(tmp_path):
    """A trainer in ``fit`` and its module after 20 steps, with what they were asked to log."""
    logged, lines = [], []
    trainer = SimpleNamespace(
        sanity_checking=False,
        num_sanity_val_steps=0,
        is_global_zero=True,
        global_step=20,
        default_root_dir=str(tmp_path / "run"),
        state=SimpleNamespace(fn="fit"),
        precision_plugin=Precision(),
        callbacks=[],
        loggers=[SimpleNamespace(log_metrics=lambda values, step: lines.append((step, values)))],
    )
    module = SimpleNamespace(
        towers=Towers(),
        inputs=tiny_inputs(),
        logits=lambda: (torch.tensor(3.0), torch.tensor(-1.0)),
        device=torch.device("cpu"),
        steps_done=20,
        built=SimpleNamespace(tokenizer=SimpleNamespace(name="ViT-B-32"), weights_loaded=True),
        log_dict=lambda values, **_: logged.append(values),
    )
    return SimpleNamespace(trainer=trainer, module=module, logged=logged, lines=lines)


def validate(callback, world, num_batches=2):
    callback.on_validation_epoch_start(world.trainer, world.module)
    for batch in range(num_batches):
        callback.on_validation_batch_start(world.trainer, world.module, None, batch)
    callback.on_validation_epoch_end(world.trainer, world.module)


def test_a_validation_logs_what_every_benchmark_found(world, caplog):
    with caplog.at_level(logging.INFO):
        validate(Benchmarks([Mean("a"), Mean("b")]), world)
    expected = {f"benchmarks/{n}/{m}": v for n in "ab" for m, v in (("mean", 2.0), ("scale", 3.0))}
    assert world.logged == [expected]
    assert "benchmark a: mean 2, scale 3" in caplog.text


def test_each_benchmark_runs_once_in_a_validation_of_many_batches(world):
    validate(Benchmarks([Mean("a")]), world, num_batches=5)
    assert world.trainer.precision_plugin.entered == 1


def test_the_newest_result_is_in_the_run_folder(world, tmp_path):
    callback = Benchmarks([Mean("a")])
    for weight in (2.0, 5.0):
        world.module.towers.weight.data.fill_(weight)
        validate(callback, world)
    found = json.loads((tmp_path / "run" / "benchmarks" / "a.json").read_text())
    assert found["metrics"]["mean"] == 5.0
    assert (found["model"], found["pretrained"], found["step"]) == ("ViT-B-32", "run step=20", 20)


def test_weights_of_no_run_keep_their_name(world, tmp_path):
    world.module.steps_done = 0
    callback = Benchmarks([Mean("a")])
    path = tmp_path / "run" / "benchmarks" / "a.json"
    for name, expected in ((None, "pretrained"), ("webli", "webli")):
        callback.weights_name = name
        callback.on_test_epoch_end(world.trainer, world.module)
        assert json.loads(path.read_text())["pretrained"] == expected


def test_without_tasks_nothing_is_done(world, tmp_path):
    validate(Benchmarks(), world)
    assert world.logged == [{}]
    assert world.trainer.precision_plugin.entered == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "runs"), [(20, False), (30, True)])
def test_every_steps_skips_the_validations_between(world, step, runs):
    callback = Benchmarks([Mean("a")], every_steps=15)
    world.module.steps_done = step
    validate(callback, world)
    assert bool(world.logged[0]) == runs


def test_a_skipped_validation_logs_no_old_numbers(world):
    callback = Benchmarks([Mean("a")], every_steps=15)
    world.module.steps_done = 15
    validate(callback, world)
    world.module.steps_done = 20
    validate(callback, world)
    assert [bool(values) for values in world.logged] == [True, False]


def test_the_validation_that_ends_a_run_always_has_them(world):
    world.trainer.state.fn = "validate"
    validate(Benchmarks([Mean("a")], every_steps=15), world)
    assert world.logged[0]


@pytest.mark.parametrize(("batches", "runs"), [(2, False), (math.inf, True)])
def test_the_evaluation_before_the_first_step_goes_to_the_logs(world, batches, runs):
    """Lightning's own check of a few batches is none."""
    world.trainer.sanity_checking, world.trainer.num_sanity_val_steps = True, batches
    validate(Benchmarks([Mean("a")], every_steps=15), world)
    assert world.logged == []
    assert [step for step, _ in world.lines] == ([0] if runs else [])


def test_weights_are_those_of_the_validation_even_if_an_average_takes_their_place(world):
    """Callbacks swap the average in and out at the ends of the epoch, in any order with ours."""

    def swap(weight):
        world.module.towers.weight.data.fill_(weight)

    callback = Benchmarks([Mean("a")])
    callback.on_validation_epoch_start(world.trainer, world.module)
    swap(7.0)
    callback.on_validation_batch_start(world.trainer, world.module, None, 0)
    swap(2.0)
    callback.on_validation_epoch_end(world.trainer, world.module)
    assert world.logged[0]["benchmarks/a/mean"] == 7.0


def test_every_batch_tells_the_watchdog_that_it_gets_on(world):
    watchdog = Watchdog()
    world.trainer.callbacks = [watchdog]
    before = watchdog._newest_heartbeat()
    validate(Benchmarks([Mean("a")]), world)
    beat = watchdog._newest_heartbeat()
    assert beat is not before
    assert beat.phase == "evaluation"


def test_only_the_first_rank_writes(world, tmp_path):
    world.trainer.is_global_zero = False
    validate(Benchmarks([Mean("a")]), world)
    assert world.logged[0]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_costs_the_file_and_not_the_run(world, tmp_path, caplog):
    (tmp_path / "run").write_text("no folder")
    validate(Benchmarks([Mean("a")]), world)
    assert world.logged[0]
    assert "the result of benchmark a cannot be written" in caplog.text


def test_wrong_settings_are_refused(world):
    with pytest.raises(UserError, match=r"benchmarks.every_steps \(0\) must be at least 1"):
        Benchmarks(every_steps=0)
    with pytest.raises(UserError, match="twice"):
        Benchmarks([Mean("a"), Mean("a")]).check()
