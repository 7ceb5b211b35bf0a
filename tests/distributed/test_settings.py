"""Whatever ranks should share and do not is named on every rank, by each loss and metric."""

from functools import lru_cache

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dist_siglip.distributed import gather_rows
from dist_siglip.distributed.handshake import agree, read_numbers
from dist_siglip.errors import UserError
from dist_siglip.losses import (
    SigLipLoss,
    WeightedLoss,
    multimodal_sigmoid_loss,
    relevance_sigmoid_loss,
    relevance_softmax_loss,
    siglip_loss,
    softmax_loss,
)
from dist_siglip.losses.calibration import collect_similarities
from dist_siglip.metrics import collect_pair_statistics, evaluate_pairs, nearest_neighbors
from tests.support.processes import run_ranks

ROWS = torch.eye(4)
IDS = torch.arange(4)
SCALE, BIAS = torch.tensor(10.0), torch.tensor(-10.0)


def _relevance():
    return torch.eye(4).bool().repeat(1, len(gather_rows(torch.zeros(1, 1))))


def _evaluate(**settings):
    fixed = {"logit_scale": 10.0, "logit_bias": -10.0}
    rank = int(settings.pop("rank"))
    return evaluate_pairs(ROWS, ROWS, IDS, IDS, IDS + 4 * rank, **(fixed | settings))


# Each is called with (rank, whether this rank is the odd one), and what the message must say.
CASES = {
    "sigmoid, scale": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE * (2 if odd else 1), BIAS),
        "logit_scale is 20 on rank 1 and 10 on rank 0",
    ),
    "sigmoid, bias": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE, BIAS + (3 if odd else 0)),
        "logit_bias is -7 on rank 1 and -10 on rank 0",
    ),
    "sigmoid, no bias": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE, None if odd else BIAS),
        "no bias",
    ),
    "sigmoid, duplicates": (
        lambda _, odd: siglip_loss(
            ROWS, ROWS, SCALE, BIAS, caption_ids=IDS, duplicates="masked" if odd else "positive"
        ),
        "duplicates: masked",
    ),
    "sigmoid, ids": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE, BIAS, caption_ids=None if odd else IDS),
        "duplicates: no ids",
    ),
    "sigmoid, exchange": (
        lambda _, odd: siglip_loss(
            ROWS, ROWS, SCALE, BIAS, exchange="ring" if odd else "all_gather"
        ),
        "ring, sum",
    ),
    "sigmoid, trained scale": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE.clone().requires_grad_(odd), BIAS),
        "gradients: scale",
    ),
    "sigmoid, scale of 0": (
        lambda _, odd: siglip_loss(ROWS, ROWS, SCALE * (0 if odd else 1), BIAS),
        "logit_scale is not above 0",
    ),
    "module, duplicates": (
        lambda _, odd: SigLipLoss(duplicates="masked" if odd else "positive")(
            ROWS, ROWS, SCALE, BIAS, caption_ids=IDS
        ),
        "duplicates: masked",
    ),
    "softmax, scale": (
        lambda _, odd: softmax_loss(ROWS, ROWS, SCALE * (2 if odd else 1)),
        "logit_scale is 20 on rank 1 and 10 on rank 0",
    ),
    "another loss": (
        lambda _, odd: (
            softmax_loss(ROWS, ROWS, SCALE) if odd else siglip_loss(ROWS, ROWS, SCALE, BIAS)
        ),
        "softmax loss",
    ),
    "weights": (
        lambda _, odd: WeightedLoss(SigLipLoss(), uniformity=2.0 if odd else 1.0)(
            ROWS, ROWS, SCALE, BIAS
        ),
        "uniformity 2.0",
    ),
    "modalities": (
        lambda _, odd: multimodal_sigmoid_loss(
            [ROWS] * 3, SCALE, BIAS, graph="star" if odd else "complete"
        ),
        "star graph of 3 modalities",
    ),
    "relevance, bias": (
        lambda _, odd: relevance_sigmoid_loss(
            ROWS, ROWS, _relevance(), SCALE, BIAS + (3 if odd else 0)
        ),
        "logit_bias is -7 on rank 1 and -10 on rank 0",
    ),
    "relevance, scale": (
        lambda _, odd: relevance_softmax_loss(ROWS, ROWS, _relevance(), SCALE * (2 if odd else 1)),
        "logit_scale is 20 on rank 1 and 10 on rank 0",
    ),
    "calibration": (
        lambda _, odd: collect_similarities(ROWS, ROWS, 64 if odd else 32),
        "batch of 64",
    ),
    "statistics": (
        lambda _, odd: collect_pair_statistics(
            ROWS, ROWS, IDS, IDS, logit_scale=5.0 if odd else 10.0, logit_bias=0.0
        ),
        "logit_scale is 5 on rank 1 and 10 on rank 0",
    ),
    "neighbours": (
        lambda _, odd: nearest_neighbors(ROWS, ROWS, 2 if odd else 3),
        "2 nearest neighbours",
    ),
    "evaluation": (
        lambda rank, odd: _evaluate(rank=rank, top_k=(1,) if odd else (1, 5)),
        r"top_k is (1,) on rank 1",
    ),
}


def _refusal(call, rank):
    with pytest.raises(UserError) as caught:
        call(rank, rank == 1)
    return str(caught.value)


def _messages(rank, world_size):
    found = {name: _refusal(call, rank) for name, (call, _) in CASES.items()}
    # The group still works, and equal settings pass.
    found["afterwards"] = [call(rank, False) is not None for call, _ in CASES.values()]
    # What a training that skips such steps lets pass is compared no more.
    scale = SCALE * (torch.inf if rank == 1 else 1)
    passed = siglip_loss(ROWS, ROWS, scale, BIAS, nonfinite="propagate")
    found["skipped"] = passed.isfinite().item()
    return found


@lru_cache
def _messages_of(world_size):
    return run_ranks(_messages, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_setting_that_differs_is_named_on_every_rank(world_size):
    for messages in _messages_of(world_size):
        for name, (_, words) in CASES.items():
            assert words in messages[name], (name, messages[name])
            assert "rank 1" in messages[name] or world_size == 2
            assert "\n" not in messages[name]
        assert all(messages["afterwards"])
    assert [found["skipped"] for found in _messages_of(world_size)].count(False) == 1


def _everyone(*values):
    """An announcement to ranks that say what this one does, but for their numbers."""

    def announce(message):
        def said_with(value):
            heard = []
            agree(1, 1, "same", lambda other: heard.append(other) or [other], {"t": value})
            return heard[0]

        return [said_with(value) for value in values]

    return announce


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ((10.0, 10.0001, 9.9999), None),  # roundings of unlike processors
        ((10.0, float("nan"), 10.0), None),  # not read this time, or skipped later
        ((0.0, 1e-4), None),
        ((10.0, 10.0, 10.1), "t is 10.1 on rank 2 and 10 on rank 0"),
        ((20.0, 10.0, 10.0), "t is 20 on rank 0 and 10 on rank 1"),
    ],
)
def test_numbers_are_compared_up_to_rounding(values, odd):
    if odd is None:
        agree(1, 1, "same", _everyone(*values), {"t": values[0]})
        return
    with pytest.raises(UserError, match=odd):
        agree(1, 1, "same", _everyone(*values), {"t": values[0]})


def test_a_device_is_read_once_for_each_use():
    """A fake CUDA tensor has no number: to read it raises, and only the first use tries."""
    compared = set()
    with FakeTensorMode():
        numbers = {"logit_scale": torch.tensor(5.0, device="cuda")}
    with pytest.raises(DataDependentOutputException):
        read_numbers(numbers, "sigmoid loss", compared)
    assert read_numbers(numbers, "sigmoid loss", compared) == {}
    assert compared == {"sigmoid loss"}
    assert read_numbers({"logit_scale": torch.tensor(5.0)}, "sigmoid loss", compared) == {
        "logit_scale": 5.0
    }


NUMPY = ROWS.numpy()
BAD_FEATURES = {
    "integers": (ROWS.long(), "must be float32"),
    "complex": (ROWS.to(torch.complex64), "must be float32"),
    "no columns": (torch.zeros(4, 0), "D of at least 1"),
    "a vector": (torch.zeros(4), r"\(B, D\)"),
    "an array": (NUMPY, "numpy.ndarray and must be a tensor"),
}
LOSSES = {
    "sigmoid": lambda rows: siglip_loss(rows, rows, SCALE, BIAS),
    "softmax": lambda rows: softmax_loss(rows, rows, SCALE),
    "modalities": lambda rows: multimodal_sigmoid_loss([rows, rows], SCALE, BIAS),
    "weighted": lambda rows: WeightedLoss(SigLipLoss())(rows, rows, SCALE, BIAS),
    "relevance": lambda rows: relevance_sigmoid_loss(rows, rows, ROWS.bool(), SCALE, BIAS),
    "relevance softmax": lambda rows: relevance_softmax_loss(rows, rows, ROWS.bool(), SCALE),
    "calibration": lambda rows: collect_similarities(rows, rows, 8),
}


@pytest.mark.parametrize("kind", BAD_FEATURES)
@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_are_none_are_named(loss, kind):
    rows, words = BAD_FEATURES[kind]
    with pytest.raises(UserError, match=words):
        LOSSES[loss](rows)


@pytest.mark.parametrize("scale", [0.0, -3.0])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax", "relevance", "relevance softmax"])
def test_a_scale_that_is_not_above_0_is_refused(monkeypatch, loss, scale):
    monkeypatch.setattr(f"{__name__}.SCALE", torch.tensor(scale))
    with pytest.raises(UserError, match="logit_scale is not above 0"):
        LOSSES[loss](ROWS)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(10.0, "must be a tensor"), (torch.tensor(1j), "must be a real number")],
)
def test_a_scale_that_is_no_real_tensor_is_named(scale, words):
    with pytest.raises(UserError, match=words):
        siglip_loss(ROWS, ROWS, scale, BIAS)
