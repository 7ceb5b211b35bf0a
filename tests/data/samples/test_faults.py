import pytest
import torch

from dist_siglip.data.samples import bad_samples
from dist_siglip.data.samples.bad_samples import BadSampleLimit, BadSampleLog
from dist_siglip.errors import UserError

CPU = torch.device("cpu")


def test_limit_is_compared_every_few_steps():
    limit = BadSampleLimit(0.1, check_steps=4)
    limit.count(5)
    for _ in range(3):
        limit.finish_step(10, CPU)
    with pytest.raises(UserError, match=r"max_bad_fraction \(0\.1\) is exceeded: 5 of 40"):
        limit.finish_step(10, CPU)
    assert limit.num_substituted == 5


def test_from_a_device_the_sum_is_read_a_step_later(monkeypatch):
    """And its check is of the samples that it was made for."""
    read = []

    class Copy:
        def __init__(self, value):
            assert value.device.type == "meta"

        def read(self):
            read.append(True)
            return torch.tensor(5)

    monkeypatch.setattr(bad_samples, "HostCopy", Copy)
    limit = BadSampleLimit(0.1, check_steps=4)
    for _ in range(4):
        limit.finish_step(10, torch.device("meta"))
    assert not read
    with pytest.raises(UserError, match=r"5 of 40"):
        limit.finish_step(10, torch.device("meta"))


def test_share_at_the_limit_is_allowed():
    limit = BadSampleLimit(0.1, check_steps=1)
    for _ in range(5):
        limit.count(1)
        limit.finish_step(10, CPU)
    limit.count(2)
    with pytest.raises(UserError, match="7 of 60"):
        limit.finish_step(10, CPU)


def test_zero_allows_none():
    limit = BadSampleLimit(0.0, check_steps=1)
    limit.finish_step(1000, CPU)
    limit.count(1)
    with pytest.raises(UserError):
        limit.finish_step(1000, CPU)


def test_the_error_names_bad_samples_of_this_start_alone(tmp_path):
    path = str(tmp_path / "bad.jsonl")
    log = BadSampleLog(path)
    log.append(shard="s.tar", key="before", reason="why")
    limit = BadSampleLimit(0.0, check_steps=1)
    limit.name_from(path)
    log.append(shard="s.tar", key="now", reason="why")
    limit.count(1)
    with pytest.raises(UserError, match=r"\(first s\.tar/now: why; all in .*bad\.jsonl\)"):
        limit.finish_step(10, CPU)


def test_all_ranks_stop_in_the_same_step(two_ranks):
    for result in two_ranks:
        first, second, third = result["bad"]
        assert (first, third) == ("fine", "fine")
        assert second.startswith("max_bad_fraction (0.1) is exceeded: 5 of 20")
