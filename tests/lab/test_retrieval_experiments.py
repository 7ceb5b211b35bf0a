"""Experiments on parity, dimensions, gaps and metrics: a quick run of each leaves nothing open."""

import importlib

import pytest

from dist_siglip.lab import LabSettings
from dist_siglip.lab.experiments import EXPERIMENTS
from dist_siglip.lab.experiments.critical_documents import on_a_curve
from dist_siglip.lab.free_embeddings import subset_relevance
from dist_siglip.metrics import relevance_margins


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


def test_ranks_agree_with_one_process():
    assert all(row.verdict == "reproduced" for row in _outcome("parity").rows)


@pytest.mark.parametrize("name", ["critical_documents", "contrastive_gap"])
def test_every_row_of_a_longer_one_is_reproduced_or_corrected(name):
    outcome = _outcome(name)
    assert outcome.rows
    assert [row for row in outcome.rows if not row.is_sound] == []


def test_a_softmax_within_a_query_is_told_from_one_threshold_for_all():
    for_all, within, *_ = _outcome("minimum_dimension").rows
    assert for_all.ours < 0 < within.ours
    assert for_all.verdict.startswith("corrected")


@pytest.mark.parametrize("num_documents", [5, 30])
def test_a_curve_in_four_dimensions_ranks_every_two_documents_first(num_documents):
    margins = relevance_margins(*on_a_curve(num_documents), subset_relevance(num_documents, 2))
    assert margins.row_margin > 0
    assert margins.top_k_accuracy == 1.0
