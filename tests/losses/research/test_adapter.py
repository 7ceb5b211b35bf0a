"""The adapter puts modalities apart, over all ranks, and folds away without a trace."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitScaleBias, multimodal_sigmoid_loss
from dist_siglip.losses.research.adapter import SimplexAdapter, simplex_corners
from tests.support.parity import LAYOUTS, global_result, largest_error, local_rows, make_rows
from tests.support.processes import run_ranks
from tests.support.reference_lab import adapted_loss_and_gradients, adapted_rows

STRENGTH, SCALE, BIAS = 0.3, 9.0, 0.1
NAMES = {2: ("image", "text"), 3: ("image", "text", "audio")}
CASES = [(k, layout) for k in NAMES for layout in ("one", "uneven-2", "uneven-3")]


def behind_adapter(strength, scale, relative_bias, **rows):
    adapter = SimplexAdapter(len(rows)).double()
    features = functional_call(adapter, {"strength_logit": strength}, (list(rows.values()),))
    return multimodal_sigmoid_loss(features, scale, -scale * relative_bias)


def behind_local_adapter(strength, **others):
    """Broken: the strength sees the loss of rows that other ranks sent without their gradient."""
    rows = {name: side for name, side in others.items() if side.ndim == 2}
    adapter = SimplexAdapter(len(rows)).double()
    mine = functional_call(adapter, {"strength_logit": strength}, (list(rows.values()),))
    everyone = [gather_rows(side.detach()) for side in mine]
    logits = others["scale"] * (mine[0] @ everyone[1].T - others["relative_bias"])
    return F.softplus(logits).sum()


def arguments_of(k, layout, rank):
    rows = local_rows(make_rows(NAMES[k], sum(layout)), layout, rank)
    scalars = {"strength": STRENGTH, "scale": SCALE, "relative_bias": BIAS}
    shared = {name: torch.tensor([value], dtype=torch.float64) for name, value in scalars.items()}
    return {name: value.requires_grad_() for name, value in (rows | shared).items()}


def all_results(rank, world_size):
    """Every case of this number of ranks, in one start."""
    results = {}
    for k, name in CASES:
        layout = LAYOUTS[name]
        if len(layout) == world_size:
            results[k, name] = global_result(behind_adapter, arguments_of(k, layout, rank))
    if world_size == 2:
        broken = global_result(behind_local_adapter, arguments_of(2, LAYOUTS["uneven-2"], rank))
        results["broken"] = broken
    return results


@lru_cache
def results_of(world_size):
    if world_size == 1:
        return all_results(0, 1)
    return run_ranks(all_results, world_size)[-1]


@lru_cache
def reference_of(k, num_pairs):
    rows = make_rows(NAMES[k], num_pairs)
    loss, gradients = adapted_loss_and_gradients(list(rows.values()), STRENGTH, SCALE, BIAS)
    names = (*rows, "strength", "scale", "relative_bias")
    truth = {"loss": loss, **dict(zip(names, gradients, strict=True))}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in truth.items()}


@pytest.mark.parametrize(("k", "name"), CASES)
def test_loss_and_gradients_behind_the_adapter_are_those_of_one_process(k, name):
    layout = LAYOUTS[name]
    result = results_of(len(layout))[k, name]
    assert all(result[key] is not None for key in ("strength", "scale", *NAMES[k]))
    assert largest_error(result, reference_of(k, sum(layout))) < 1e-8


def test_a_gradient_that_leaves_out_other_ranks_is_rejected():
    result = {"strength": results_of(2)["broken"]["strength"]}
    assert largest_error(result, reference_of(2, sum(LAYOUTS["uneven-2"]))) > 1e-3


def features_of(k, num_rows=6, dtype=torch.float64):
    return list(make_rows([str(number) for number in range(k)], num_rows, dtype).values())


@pytest.mark.parametrize("k", [2, 3, 5])
def test_rows_behind_the_adapter_have_the_products_of_the_construction(k):
    """Corners may be turned, so products are compared: delta^2 <x, y> - (1 - delta^2) / (k-1)."""
    features = features_of(k)
    adapted = SimplexAdapter(k, start_logit=STRENGTH).double()(features)
    truth = adapted_rows([side.tolist() for side in features], STRENGTH)
    for a in range(k):
        for b in range(k):
            expected = torch.tensor(truth[a]).double() @ torch.tensor(truth[b]).double().T
            assert torch.allclose(adapted[a] @ adapted[b].T, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_corners_are_a_regular_simplex(k):
    corners = simplex_corners(k)
    expected = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
    assert corners.shape == (k, k - 1)
    assert torch.allclose(corners @ corners.T, expected, atol=1e-14)


def loss_and_gradients(features, scale, relative_bias, adapter=None):
    leaves = [side.clone().requires_grad_() for side in features]
    t, b = torch.tensor([scale, -scale * relative_bias], dtype=torch.float64)
    loss = multimodal_sigmoid_loss(leaves if adapter is None else adapter(leaves), t, b)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folded_scale_and_relative_bias_give_the_same_loss_and_gradients(k):
    adapter = SimplexAdapter(k, start_logit=STRENGTH).double()
    loss, gradients = loss_and_gradients(features_of(k), 25.0, -0.3, adapter)
    folded, expected = loss_and_gradients(features_of(k), *adapter.fold(25.0, -0.3))
    assert torch.allclose(loss, folded, rtol=1e-10)
    assert all(torch.allclose(*pair, rtol=1e-10) for pair in zip(gradients, expected, strict=True))


def test_folding_with_the_wrong_sign_is_rejected():
    adapter = SimplexAdapter(2, start_logit=STRENGTH).double()
    loss, _ = loss_and_gradients(features_of(2), 25.0, -0.3, adapter)
    scale, relative_bias = adapter.fold(25.0, -0.3)
    kept = scale / 25.0
    wrong, _ = loss_and_gradients(features_of(2), scale, relative_bias - 2 * (1 - kept) / kept)
    assert not torch.allclose(loss, wrong, rtol=1e-2)


def test_training_behind_the_adapter_starts_where_it_would_without():
    adapter = SimplexAdapter(3).double()
    start, _ = loss_and_gradients(features_of(3), *adapter.unfold(10.0, 1.0), adapter)
    without, _ = loss_and_gradients(features_of(3), 10.0, 1.0)
    assert torch.allclose(start, without, rtol=1e-10)
    assert adapter.fold(*adapter.unfold(10.0, 1.0)) == pytest.approx((10.0, 1.0), rel=1e-12)


def test_the_strength_starts_as_in_the_authors_notebook():
    assert SimplexAdapter().delta.item() == pytest.approx(0.6225, abs=1e-4)


def test_dropping_the_last_coordinates_gives_the_features_back():
    adapter = SimplexAdapter(4, start_logit=STRENGTH).double()
    features = features_of(4)
    for adapted, side in zip(adapter(features), features, strict=True):
        assert torch.allclose(adapted.norm(dim=1), torch.ones(6).double(), rtol=1e-10)
        assert torch.allclose(adapted[:, : side.shape[1]] / adapter.delta, side, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_keep_their_dtype_under_float32_parameters(dtype):
    adapted = SimplexAdapter()(features_of(2, dtype=dtype))
    assert [side.dtype for side in adapted] == [dtype, dtype]


def test_an_adapter_trains_together_with_scale_and_bias():
    adapter, logits = SimplexAdapter(), LogitScaleBias(bias_parameterization="relative")
    loss = multimodal_sigmoid_loss(adapter(features_of(2, dtype=torch.float32)), *logits())
    loss.backward()
    assert adapter.strength_logit.grad.abs() > 0


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match=r"num_modalities \(1\) must be at least 2"):
        SimplexAdapter(1)
    with pytest.raises(UserError, match=r"start_logit \(inf\) must be finite"):
        SimplexAdapter(start_logit=float("inf"))
    with pytest.raises(UserError, match="features holds 3 modalities; the adapter is for 2"):
        SimplexAdapter()(features_of(3))
