"""The rank the others wait for is logged, and named if it stays the same."""

import logging
import time

import pytest
import torch
from lightning.pytorch import Callback

from dist_siglip.health import step_timing
from dist_siglip.health.step_timing import RankTimes, StepTimer
from dist_siglip.training.callbacks import Preemption, Throughput
from dist_siglip.training.callbacks.throughput import Stragglers, is_straggler
from tests.support.clock import CountedClock
from tests.support.processes import run_ranks
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

USUAL = RankTimes(0.1, 3.0, 10.0)
SLOW_DATA = RankTimes(4.0, 3.0, 10.0)
SLOW_TOWERS = RankTimes(0.1, 6.5, 10.0)


def warnings_of(*intervals, tells=True):
    stragglers = Stragglers()
    logger = logging.getLogger("dist_siglip.training.callbacks.throughput")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        for times_by_rank in intervals:
            stragglers.look(times_by_rank, tells=tells)
    finally:
        logger.removeHandler(handler)
    return heard


def test_the_slowest_rank_and_the_shares_of_its_time_are_logged():
    assert Stragglers().look([USUAL, USUAL, SLOW_DATA], tells=True) == {
        "train/slowest_rank": 2.0,
        "train/slowest_rank_data_wait_percent": 40.0,
        "train/slowest_rank_encode_percent": 30.0,
    }


def test_a_rank_that_is_slow_in_three_intervals_is_named_with_what_it_spends_its_time_on():
    (text,) = warnings_of(*[[USUAL, SLOW_TOWERS, USUAL]] * 4)
    assert text.startswith("rank 1 keeps the others waiting: 1 % of its time for data and 65 % in")
    assert "the median of ranks 1 % and 30 %, over 3 logged intervals" in text


def test_the_start_a_passing_slowness_and_changing_ranks_are_not_blamed():
    slow, fine = [USUAL, SLOW_DATA, USUAL], [USUAL] * 3
    other = [SLOW_DATA, USUAL, USUAL]
    assert warnings_of(slow, slow, slow, fine, slow, slow) == []
    assert warnings_of(fine, slow, other, slow, other, slow, other) == []


def test_one_rank_tells_and_rarely():
    slow = [USUAL, SLOW_DATA]
    assert len(warnings_of(*[slow] * 100)) == 2  # the first and the tenth row of three
    assert warnings_of(*[slow] * 100, tells=False) == []


def test_what_costs_the_others_little_does_not_matter():
    quick, slower = RankTimes(0.001, 0.01, 10.0), RankTimes(0.01, 0.2, 10.0)
    assert not is_straggler(1, [quick, slower, quick])


def test_of_the_step_under_way_nothing_is_taken_yet(monkeypatch):
    clock, timer = CountedClock(), StepTimer()
    monkeypatch.setattr("dist_siglip.health.step_timing.time", clock)
    for _ in range(2):
        timer.begin_encoding(torch.device("cpu"))
        timer.end_encoding()
        timer.end_step(0.25, 1.0)
    timer.begin_encoding(torch.device("cpu"))
    clock.sleep(0.05)
    timer.end_encoding()
    data, encode, seconds = timer.take_row(1, 2)[3:].tolist()
    assert (data, seconds) == (0.5, 2.0)
    assert encode == pytest.approx(2 * clock.TICK)
    timer.end_step(0.0, 0.1)
    assert timer.take_row(0, 1)[1] == 0.0  # the next step's towers are not there yet


@pytest.mark.gpu
def test_on_a_device_the_towers_are_timed_without_waiting_for_it():
    timer, device = StepTimer(), torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(2):
        timer.begin_encoding(device)
        for _ in range(200):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        timer.end_encoding()
    enqueued = time.perf_counter() - started
    assert timer.take_row(0, 1)[1] == 0.0  # not there yet
    torch.cuda.synchronize()
    encode_seconds = float(timer.take_row(0, 1)[1])
    assert encode_seconds > 0.01
    assert enqueued < time.perf_counter() - started


class _Late(Callback):
    """Rank 1's next batch, or towers, take their time."""

    def __init__(self, rank, where, clock):
        self.is_slow, self.where, self.clock = rank == 1, where, clock

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.is_slow and self.where == "data":
            self.clock.sleep(0.4)


def _logged(rank, world_size, model, folder):
    found, clock = {}, CountedClock()
    step_timing.time = clock  # in this process, which does nothing else
    for where in ("data", "towers"):
        module, values = locked_module(model), {}
        if where == "towers" and rank == 1:
            own = module.encode
            module.encode = lambda batch, own=own: (clock.sleep(0.4), own(batch))[1]
        keep = module.log_dict
        module.log_dict = lambda metrics, keep=keep, values=values, **options: (
            values.update(metrics),
            keep(metrics, **options),
        )
        batches = batches_of(5, rank, world_size)
        fit(
            module,
            f"{folder}/{where}",
            batches,
            rank,
            world_size,
            # Without the first, Lightning asks rank 0 between steps whether to stop.
            callbacks=[
                Preemption(agree_every_steps=100),
                Throughput(),
                _Late(rank, where, clock),
            ],
            log_every_n_steps=2,
        )
        found[where] = {name: float(v) for name, v in values.items() if "slowest" in name}
    return found


def test_training_finds_the_rank_that_is_slow_in_its_data_or_in_its_towers(tmp_path):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])
    for results in run_ranks(_logged, 2, model, str(tmp_path)):
        for where, name, other in (
            ("data", "data_wait", "encode"),
            ("towers", "encode", "data_wait"),
        ):
            assert results[where]["train/slowest_rank"] == 1.0
            share = results[where][f"train/slowest_rank_{name}_percent"]
            assert share > results[where][f"train/slowest_rank_{other}_percent"]
