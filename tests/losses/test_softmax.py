"""What the softmax loss promises besides parity: arguments, precision, memory, open_clip."""

import math

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.errors import UserError
from dist_siglip.losses import ClipLoss, ring_pass, softmax_loss
from tests.support.processes import run_ranks
from tests.support.reference_pairwise import softmax_loss_and_gradients


def _features(num_pairs=6, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, num_pairs, width, dtype=torch.float64, generator=generator)
    return [F.normalize(side, dim=-1).to(dtype).requires_grad_() for side in both]


def _scale(value=5.0, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_gradients_pass_gradcheck():
    def loss(*tensors):
        return softmax_loss(*tensors, chunk_rows=4)

    assert torch.autograd.gradcheck(loss, (*_features(), _scale()))


def test_features_that_are_all_alike_cost_log_n():
    one = F.normalize(torch.ones(7, 3), dim=-1)
    assert softmax_loss(one, one, torch.tensor(50.0)).item() == pytest.approx(math.log(7))


def test_one_pair_alone_costs_nothing_and_pulls_nothing():
    images, texts = _features(1)
    loss = softmax_loss(images, texts, _scale())
    loss.backward()
    assert loss.item() == 0
    assert images.grad.abs().max() == texts.grad.abs().max() == 0


def test_no_rows_at_all_cost_nothing():
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = softmax_loss(nothing, nothing, torch.tensor(5.0))
    loss.backward()
    assert loss.item() == 0


def test_swapping_the_towers_changes_nothing():
    images, texts = _features()
    swapped = softmax_loss(texts, images, _scale())
    assert torch.allclose(softmax_loss(images, texts, _scale()), swapped, rtol=1e-14)


def test_permuting_the_pairs_changes_nothing():
    images, texts = _features()
    order = torch.randperm(len(images))
    permuted = softmax_loss(images[order], texts[order], _scale())
    assert torch.allclose(softmax_loss(images, texts, _scale()), permuted, rtol=1e-14)


def test_a_bias_changes_nothing_and_its_gradient_is_zero():
    images, texts = _features()
    bias = torch.tensor([-10.0], requires_grad=True)
    loss = softmax_loss(images, texts, _scale(), bias)
    loss.backward()
    assert torch.equal(loss, softmax_loss(images, texts, _scale()))
    assert bias.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 100.0, 1000.0])
def test_extreme_logits_have_the_right_loss_and_finite_gradients(scale, dtype):
    images, texts = _features(8, 3, dtype)
    scalar = _scale(scale, dtype)
    loss = softmax_loss(images, texts, scalar, chunk_rows=3)
    loss.backward()
    reference = softmax_loss_and_gradients(images.detach(), texts.detach(), scale)
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=1e-6)
    for tensor, name in ((images, "image"), (texts, "text"), (scalar, "scale")):
        size = reference[name].abs().max()
        # A float32 logit of 1000 is known to 6e-5, and so is the exponential of a difference.
        assert ((tensor.grad - reference[name]).abs().max() / size).item() < 2e-4


def test_a_loss_far_below_the_rounding_of_its_logits_keeps_its_digits():
    """At a scale of 60 the loss is 1e-26: log-sum-exp minus logit would be 0 in float32."""
    images = torch.eye(3, requires_grad=True)
    loss = softmax_loss(images, torch.eye(3), torch.tensor(60.0))
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.exp(-60), rel=1e-5)
    pull = -60 * 2 * math.exp(-60) / 3  # scale * (softmax of the positive - 1) / N
    assert images.grad[0, 0].item() == pytest.approx(pull, rel=1e-5)


def test_bfloat16_features_at_a_high_scale_cost_digits_of_the_features_only():
    """Products rounded to bfloat16 as well would cost 2e-2 of the gradients here."""
    generator = torch.Generator().manual_seed(0)
    centres, *noise = torch.randn(3, 256, 64, generator=generator, dtype=torch.float64)
    sides = [F.normalize(centres + 0.8 * one, dim=-1).bfloat16().requires_grad_() for one in noise]
    softmax_loss(*sides, torch.tensor(100.0)).backward()
    exact = [side.detach().double().requires_grad_() for side in sides]
    softmax_loss(*exact, torch.tensor(100.0)).backward()
    for half, double in zip(sides, exact, strict=True):
        assert (half.grad - double.grad).norm() / double.grad.norm() < 5e-3


def test_autocast_does_not_reach_into_the_loss():
    images, texts = (side.detach().float() for side in _features())
    scale = torch.tensor(5.0)
    expected = softmax_loss(images, texts, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(softmax_loss(images, texts, scale), expected)


def test_a_second_backward_gives_the_same_gradients():
    inputs = (*_features(), _scale())
    loss = softmax_loss(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    for one, three in zip(first, second, strict=True):
        assert torch.allclose(3 * one, three, rtol=1e-14)


def test_second_order_gradients_are_refused_not_wrong():
    images, texts = _features()
    loss = softmax_loss(images, texts, _scale())
    with pytest.raises(RuntimeError, match=r"softmax_loss has first-order .* create_graph=True"):
        torch.autograd.grad(loss, images, create_graph=True)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements a tensor had that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_the_features_or_a_tile():
    images, texts = _features(256, 4)
    scale = _scale()
    with _LargestTensor() as largest:
        softmax_loss(images, texts, scale, chunk_rows=16).backward()
    assert largest.elements == 256 * 4 > 16 * 16


@pytest.mark.parametrize(
    ("frozen", "travels", "brings_back"),
    [("none", "text", True), ("image", "image", False), ("text", "text", False)],
)
def test_the_side_that_needs_no_gradient_travels(monkeypatch, frozen, travels, brings_back):
    images, texts = _features()
    sides = {"image": images, "text": texts}
    if frozen != "none":
        sides[frozen].requires_grad_(False)
    calls = []
    prepare = ring_pass.prepare_exchange

    def spy(columns, **options):
        calls.append((columns, options["accumulators"]))
        return prepare(columns, **options)

    monkeypatch.setattr(ring_pass, "prepare_exchange", spy)
    softmax_loss(images, texts, _scale())
    (first, _), (second, gradients) = calls
    assert torch.equal(first[0], sides[travels])
    assert torch.equal(second[0], sides[travels])
    assert len(gradients) == brings_back


def test_without_gradients_there_is_one_pass(monkeypatch):
    calls = []
    prepare = ring_pass.prepare_exchange

    def spy(columns, **options):
        calls.append(columns)
        return prepare(columns, **options)

    monkeypatch.setattr(ring_pass, "prepare_exchange", spy)
    with torch.no_grad():
        softmax_loss(*_features(), _scale())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(5, 4)}, r"image_features \(6, 4\) and text_features \(5, 4\)"),
        ({"text": torch.zeros(6, 4)}, r"must have one dtype"),
        ({"scale": torch.ones(2)}, r"logit_scale \(2,\) must have one element"),
        ({"scale": torch.tensor(torch.inf)}, r"rank 0: logit_scale is not finite"),
        ({"bias": torch.ones(2)}, r"logit_bias \(2,\) must have one element"),
        ({"chunk_rows": 0}, r"chunk_rows \(0\) must be at least 1"),
        ({"exchange": "rings"}, r"exchange \('rings'\) must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    images, texts = (side.detach() for side in _features())
    with pytest.raises(UserError, match=message):
        softmax_loss(
            images,
            change.get("text", texts),
            change.get("scale", torch.tensor(5.0)),
            change.get("bias"),
            chunk_rows=change.get("chunk_rows", 4),
            exchange=change.get("exchange", "auto"),
        )


def test_a_row_that_is_not_finite_is_named():
    images, texts = (side.detach() for side in _features())
    texts[3, 1] = torch.nan
    with pytest.raises(UserError, match=r"rank 0: text_features row 3 is not finite"):
        softmax_loss(images, texts, torch.tensor(5.0))


def test_wrong_constructor_arguments_are_named():
    with pytest.raises(UserError, match=r"use_horovod \(True\) must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(UserError, match=r"world_size \(2\) differs from the process group's \(1\)"):
        ClipLoss(world_size=2)(*_features(), _scale())


def _losses_and_gradients(loss_module, rank=0, bias=None):
    arguments = (*_features(5, 8, seed=rank), _scale(9.0))
    loss = loss_module(*arguments, bias, output_dict=True)["contrastive_loss"]
    loss.backward()
    return [loss.detach(), *(argument.grad for argument in arguments)]


def _close(ours, theirs):
    return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bias", [None, torch.tensor(-4.0, dtype=torch.float64)])
def test_same_value_and_gradients_as_open_clip_in_one_process(bias):
    ours = _losses_and_gradients(ClipLoss(True, True, False, 0, 1), bias=bias)
    theirs = _losses_and_gradients(open_clip.loss.ClipLoss(True, True, False, 0, 1), bias=bias)
    assert _close(ours, theirs)


class _Tower(torch.nn.Module):
    """One linear layer for both sides, a scale and the bias that a SigLIP model has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 4)
        self.log_scale = torch.nn.Parameter(torch.tensor([1.0]))
        self.logit_bias = torch.nn.Parameter(torch.tensor([-10.0]))

    def forward(self, sides):
        features = [F.normalize(self.layer(side), dim=-1) for side in sides]
        return *features, self.log_scale.exp(), self.logit_bias


def _two_steps_under_ddp(rank):
    """DDP complains in the second step about parameters without gradient in the first."""
    model = DistributedDataParallel(_Tower())
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        sides = torch.randn(2, 3, 8, generator=generator)
        model.zero_grad()
        ClipLoss()(*model(sides)).backward()
    return model.module.logit_bias.grad.item()


def _caught(*arguments, **options):
    with pytest.raises(UserError) as caught:
        softmax_loss(*arguments, **options)
    return str(caught.value)


def _on_two_ranks(rank, world_size):
    ours = _losses_and_gradients(ClipLoss(True, True, False, rank, world_size), rank)
    both_on = open_clip.loss.ClipLoss(True, True, False, rank, world_size)
    theirs = _losses_and_gradients(both_on, rank)
    for value in (*ours, *theirs):
        if value.ndim == 0:  # as DDP would
            dist.all_reduce(value)
    good, scale = torch.eye(4), torch.tensor(10.0)
    odd = good.clone().requires_grad_() if rank == 1 else good
    bad = good.clone()
    bad[2, 0] = torch.nan if rank == 1 else 1.0
    return {
        "as open_clip": _close(ours, theirs),
        "bias gradient": _two_steps_under_ddp(rank),
        "gradients": _caught(odd, good, scale),
        "not finite": _caught(good, bad, scale),
        "afterwards": softmax_loss(good, good, scale).item(),
    }


def test_two_ranks_agree_with_open_clip_run_under_ddp_and_name_what_differs():
    for results in run_ranks(_on_two_ranks, 2):
        assert results["as open_clip"]
        assert results["bias gradient"] == 0
        assert "gradients: image" in results["gradients"]
        assert "gradients: none" in results["gradients"]
        assert "rank 1 passes" in results["not finite"]
        assert "text_features row 2 is not finite" in results["not finite"]
        assert math.isfinite(results["afterwards"])
