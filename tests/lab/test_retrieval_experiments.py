"""Experiments on parity, dimensions, gaps and metrics: a quick run of each leaves nothing open."""

import importlib

import pytest

from dist_siglip.lab import LabSettings
from dist_siglip.lab.catalogue import EXPERIMENTS


def _outcome(name):
    done = []
    module = importlib.import_module(EXPERIMENTS[name].module)
    outcome = module.run(LabSettings(quick=True, progress=done.append))
    assert done == sorted(done)
    assert done[-1] == 1.0
    return outcome


@pytest.mark.parametrize("name", ["closed_forms", "siglip_start", "batch_size"])
def test_every_row_is_reproduced_or_corrected(name):
    outcome = _outcome(name)
    assert outcome.rows
    assert [row for row in outcome.rows if not row.is_sound] == []
    assert outcome.figure.axes


@pytest.mark.distributed
def test_ranks_agree_with_one_process():
    assert all(row.verdict == "reproduced" for row in _outcome("parity").rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critical_documents", "contrastive_gap"])
def test_every_row_of_a_longer_one_is_reproduced_or_corrected(name):
    outcome = _outcome(name)
    assert outcome.rows
    assert [row for row in outcome.rows if not row.is_sound] == []


def test_a_softmax_within_a_query_is_told_from_one_threshold_for_all():
    for_all, within, *_ = _outcome("minimum_dimension").rows
    assert for_all.ours < 0 < within.ours
    assert for_all.verdict.startswith("corrected")
