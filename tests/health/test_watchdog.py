from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dist_siglip.distributed import waiting
from dist_siglip.errors import UserError
from dist_siglip.health import hang_watchdog
from dist_siglip.health.hang_report import HangReport, RankStatus, describe, stalled_ranks
from dist_siglip.health.hang_watchdog import DeviceProgress, HangWatchdog, Heartbeat
from dist_siglip.training.callbacks import Watchdog
from tests.support.processes import run_ranks

MINUTE = 60.0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"collective_minutes": 0}, r"watchdog.collective_minutes \(0\) must be above 0"),
        ({"stall_minutes": -1.0}, r"watchdog.stall_minutes \(-1.0\) must be above 0"),
        ({"slow_minutes": 1}, r"slow_minutes \(1\) must be at least stall_minutes \(8.0\)"),
    ],
)
def test_limits_that_cannot_work_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        Watchdog(**settings)


def beats_of_a_run(watchdog):
    """What the watchdog sees after each hook of two steps, an evaluation and a checkpoint."""
    trainer, seen = SimpleNamespace(global_step=0), []

    def call(hook, *arguments):
        getattr(watchdog, hook)(trainer, None, *arguments)
        heartbeat = watchdog._newest_heartbeat()
        seen.append((heartbeat.phase, heartbeat.step, heartbeat.limit_seconds / MINUTE))

    for _ in range(2):
        call("on_train_batch_start", None, 0)
        trainer.global_step += 1
        call("on_train_batch_end", None, None, 0)
    call("on_validation_start")
    call("on_validation_batch_end", None, None, 0)
    call("on_validation_end")
    call("on_train_end")
    return seen


def test_only_the_first_step_the_evaluation_and_the_end_may_be_slow():
    assert beats_of_a_run(Watchdog(stall_minutes=2, slow_minutes=20)) == [
        ("step", 1, 20),
        ("waiting for data", 2, 2),
        ("step", 2, 2),
        ("waiting for data", 3, 2),
        ("evaluation", 2, 20),
        ("evaluation", 2, 20),
        ("waiting for data", 3, 2),
        ("ending", 2, 20),
    ]


def test_a_checkpoint_may_be_slow_until_it_is_written(monkeypatch):
    watchdog = Watchdog(stall_minutes=2, slow_minutes=20)
    trainer = SimpleNamespace(global_step=4)
    watchdog.on_train_batch_end(trainer, None, None, None, 0)
    monkeypatch.setattr("dist_siglip.health.callback.is_inside", lambda name: True)
    watchdog.on_save_checkpoint(trainer, None, {})
    saving = watchdog._newest_heartbeat()
    monkeypatch.setattr("dist_siglip.health.callback.is_inside", lambda name: False)
    after = watchdog._newest_heartbeat()
    assert (saving.phase, saving.step, saving.limit_seconds) == ("saving a checkpoint", 4, 1200)
    assert (after.phase, after.step, after.limit_seconds) == ("waiting for data", 5, 120)


def test_a_call_inside_the_one_asked_for_is_found():
    def save_checkpoint():
        return waiting.is_inside("save_checkpoint"), waiting.is_inside("no_such_function")

    assert save_checkpoint() == (True, False)
    assert not waiting.is_inside("save_checkpoint")


def _limits(rank, world_size, folder):
    """Limits of the group: as it was, then by the callback, then by a strategy's own."""
    found = []
    watchdog = Watchdog(collective_minutes=3, stall_minutes=None)
    for given in (None, timedelta(minutes=30), timedelta(minutes=7)):
        if given is not None:
            strategy = SimpleNamespace(_timeout=given)
            trainer = SimpleNamespace(strategy=strategy, default_root_dir=folder, global_rank=rank)
            watchdog.setup(trainer, None, "fit")
        options = dist.group.WORLD._get_backend(dist.distributed_c10d._get_pg_default_device())
        found.append(options.options._timeout.total_seconds() / MINUTE)
    return found


def test_the_group_gets_the_limit_unless_its_strategy_has_one_of_its_own(tmp_path):
    found = run_ranks(_limits, 2, str(tmp_path), timeout_seconds=30.0)
    assert found == [[0.5, 3, 3]] * 2


def test_it_may_be_turned_off(tmp_path):
    watchdog = Watchdog(stall_minutes=None)
    watchdog.setup(SimpleNamespace(default_root_dir=tmp_path), None, "fit")
    assert watchdog._watchdog is None
    watchdog.on_exception(None, None, KeyError())
    watchdog.teardown(None, None, "fit")


class FakeEvent:
    """An event of a device that stands still, or of one that does not."""

    def __init__(self, is_done):
        self.is_done = is_done

    def query(self):
        return self.is_done


def status_of(launched, done, tmp_path, *, sees_device=True):
    """Status of a rank whose host has launched so many steps, of which the device has done some."""
    watchdog = Watchdog()
    steps = iter(range(100))
    watchdog._device = DeviceProgress(lambda: FakeEvent(next(steps) // 3 < done))
    trainer = SimpleNamespace(global_step=0)
    for _ in range(launched):
        watchdog.on_train_batch_start(trainer, None, None, 0)
        watchdog.on_before_backward(trainer, None, None)
        trainer.global_step += 1
        watchdog.on_train_batch_end(trainer, None, None, None, 0)
    thread = HangWatchdog(
        watchdog._newest_heartbeat,
        stacks=tmp_path / "stacks",
        group=None,
        end_children=lambda: None,
        device=watchdog._device if sees_device else None,
    )
    return thread._status(thread._doing())


def test_ranks_whose_devices_wait_blame_the_one_that_has_launched_nothing(tmp_path):
    """Rank 1 got no batch for step 5: its device has nothing to do, those of the others wait."""
    late = status_of(4, 4, tmp_path)
    waiting_ranks = status_of(5, 4, tmp_path)
    statuses = {0: waiting_ranks, 1: late, 2: waiting_ranks}
    assert [status.waits for status in statuses.values()] == [True, False, True]
    assert stalled_ranks(statuses, 3) == [1]
    line = describe(statuses, 3)
    assert line.startswith("rank 1 is behind: waiting for data, step 5")
    assert "its device has not finished step 5, waiting for data, step 6" in line
    # Where hosts stand alike only their devices tell.
    assert stalled_ranks({0: status_of(4, 3, tmp_path), 1: late}, 2) == [1]
    blind = status_of(4, 3, tmp_path, sees_device=False)
    assert stalled_ranks({0: blind, 1: late}, 2) == [0, 1]


def test_where_every_device_waits_no_rank_is_blamed(tmp_path):
    stuck = status_of(5, 2, tmp_path)
    assert stuck.doing.endswith("while its device has not finished step 3")
    assert describe({0: stuck, 1: stuck}, 2).startswith(
        "every rank waits for others: a network or a device is stuck"
    )


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_collective_that_fails_since_others_ended_a_hang_ends_with_their_code(
    tmp_path, monkeypatch, has_failed
):
    """The first rank may hear of the hang by its collective before its own thread ends it."""
    store, codes = dist.HashStore(), []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(hang_watchdog.os, "_exit", leave)
    monkeypatch.setattr(hang_watchdog, "_LEAVE_SECONDS", 0.1)
    behind = RankStatus(step=6, phase="step", is_overdue=not has_failed)
    HangReport(store, 1, 2).poll(behind, 0.1, has_failed=has_failed)
    thread = HangWatchdog(
        lambda: Heartbeat(step=6, phase="step", order=2, limit_seconds=60),
        stacks=tmp_path / "stacks.txt",
        group=None,
        end_children=lambda: None,
    )
    thread._speaker = HangReport(store, 0, 2)
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    if has_failed:
        assert thread.explain(error) == thread.verdict.line
        assert codes == []
    else:
        with pytest.raises(SystemExit):
            thread.explain(error)
        assert codes == [hang_watchdog.EXIT_HUNG]
        assert thread.verdict.line in (tmp_path / "stacks.txt").read_text()
