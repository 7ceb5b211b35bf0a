import threading

import pytest

from dist_siglip.data.remote.connections import StoppedError, longest_wait, pause, stoppable


def test_a_thread_waits_as_long_as_it_likes():
    assert longest_wait(1000.0) == 1000.0


def test_a_stoppable_thread_waits_in_steps_and_ends_when_told():
    stopped = threading.Event()
    with stoppable(stopped):
        assert longest_wait(1000.0) < 1.0
        stopped.set()
        with pytest.raises(StoppedError):
            pause(1000.0)
    assert longest_wait(1000.0) == 1000.0


def test_other_threads_are_not_stopped():
    stopped, seen = threading.Event(), []
    stopped.set()
    with stoppable(stopped):
        other = threading.Thread(target=lambda: seen.append(longest_wait(1000.0)))
        other.start()
        other.join()
    assert seen == [1000.0]
