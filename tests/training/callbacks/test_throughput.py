from types import SimpleNamespace

import pytest
import torch

from dist_siglip.health import step_timing
from dist_siglip.training.callbacks.throughput import Throughput, workers_needed


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(step_timing.time, "perf_counter", lambda: self.now)

    def work(self, seconds):
        """A device that the host waits for."""
        self.now += seconds


class Device(Clock):
    """A device that works behind the host, with the events of CUDA."""

    def __init__(self, monkeypatch, host_seconds):
        super().__init__(monkeypatch)
        self.free, self.host_seconds = 0.0, host_seconds
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.moment = device.free = max(device.now, device.free)

            def query(self):
                return self.moment <= device.now

            def elapsed_time(self, end):
                assert end.query(), "CUDA raises for an event that has not passed"
                return 1000 * (end.moment - self.moment)

        monkeypatch.setattr(step_timing.torch.cuda, "Event", Event)

    def work(self, seconds):
        """Tell the device what to do, which takes the host little."""
        self.free = max(self.now, self.free) + seconds
        self.now += self.host_seconds


class Module:
    def __init__(self, device):
        self.logged, self.device = [], torch.device(device)

    def log_dict(self, values):
        self.logged.append(values)


def run(clock, *, wait, busy, steps, workers=2, every=2):
    """Train in fake time; return what was logged."""
    module = Module("cuda" if isinstance(clock, Device) else "cpu")
    trainer = SimpleNamespace(
        log_every_n_steps=every,
        world_size=2,
        num_devices=2,
        global_step=0,
        loggers=[],
        is_global_zero=True,
        datamodule=SimpleNamespace(workers_per_rank=workers),
    )
    batch = SimpleNamespace(images=range(8))
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for step in range(steps):
        clock.now += wait
        callback.on_train_batch_start(trainer, module, batch, step)
        clock.work(busy)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, step)
    return module.logged


def test_speed_and_waiting_are_logged_per_interval(monkeypatch):
    logged = run(Clock(monkeypatch), wait=1.0, busy=3.0, steps=4)
    assert len(logged) == 2
    assert logged[1]["train/data_wait_percent"] == pytest.approx(25)
    assert logged[1]["train/pairs_per_second"] == pytest.approx(2 * 8 * 2 / 8)


def test_on_a_device_that_works_behind_the_host_its_own_times_are_logged(monkeypatch):
    """The host is through with a step after a tenth of it; of its clock it waits for nothing."""
    device = Device(monkeypatch, host_seconds=0.1)
    logged = run(device, wait=0.0, busy=1.0, steps=60)
    assert {each["train/data_wait_percent"] for each in logged} == {0.0}
    speeds = [each["train/pairs_per_second"] for each in logged]
    assert speeds == pytest.approx([8 * 2] * len(speeds))
    assert 0 < len(speeds) < 10  # what the device has not done is not counted yet


def test_on_a_device_waiting_is_what_its_work_does_not_cover(monkeypatch, caplog):
    """A batch takes 3 s to come, a step 1 s, the host 0.1 s: the device waits for 2.1 of 3.1 s."""
    logged = run(Device(monkeypatch, host_seconds=0.1), wait=3.0, busy=1.0, steps=9)
    assert logged[-1]["train/data_wait_percent"] == pytest.approx(100 * 2.1 / 3.1)
    assert logged[-1]["train/pairs_per_second"] == pytest.approx(8 * 2 / 3.1)
    assert "68 % of the time waits" in caplog.text
    assert "the model could take 8" in caplog.text


def test_a_data_bound_run_is_told_how_many_workers_it_needs(monkeypatch, caplog):
    run(Clock(monkeypatch), wait=3.0, busy=1.0, steps=8)
    (record,) = [r for r in caplog.records if "data-bound" in r.message]
    assert "75 % of the time waits" in record.message
    assert "2 workers a rank deliver 2 pairs/s, the model could take 8" in record.message
    assert "about 8 workers_per_rank" in record.message


def test_it_is_said_rarely(monkeypatch, caplog):
    run(Clock(monkeypatch), wait=3.0, busy=1.0, steps=2 * 60)
    assert caplog.text.count("data-bound") == 2  # at the first and the tenth such interval


def test_a_run_that_keeps_up_and_the_start_of_the_workers_are_not_blamed(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    run(clock, wait=0.1, busy=1.0, steps=20)
    run(clock, wait=9.0, busy=1.0, steps=2)
    assert "data-bound" not in caplog.text


def test_loading_in_the_training_process_counts_as_one_worker(monkeypatch, caplog):
    run(Clock(monkeypatch), wait=2.5, busy=1.0, steps=8, workers=0)
    assert "about 3 workers_per_rank" in caplog.text
    assert workers_needed(0, 1.0, 0.2) == 1
    assert workers_needed(3, 1.0, 0.0) == 3
