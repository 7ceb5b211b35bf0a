"""What the sigmoid loss promises besides parity: arguments, precision, autograd, extremes."""

import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dist_siglip.distributed import prepare_exchange
from dist_siglip.errors import UserError
from dist_siglip.losses import SigLipLoss, siglip_loss
from dist_siglip.losses.kernels.tiles import SigmoidTiles
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients, softplus


def _features(num_pairs=6, width=4, dtype=torch.float64):
    both = torch.randn(2, num_pairs, width, dtype=dtype)
    return [F.normalize(side, dim=-1).requires_grad_() for side in both]


def _scalars(scale=5.0, bias=-2.0, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (scale, bias)]


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(siglip_loss, (*_features(), *_scalars()))


def test_the_start_loss_of_siglip_is_about_ten():
    """Nearly orthogonal features at scale 10, bias -10: log(1+e^10) + (N-1) log(1+e^-10)."""
    features = torch.eye(64)
    images, texts = features[:32], features[32:]
    loss = siglip_loss(images, texts, torch.tensor(10.0), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(softplus(10) + 31 * softplus(-10), rel=1e-6)


def test_swapping_the_towers_changes_nothing():
    images, texts = _features()
    assert torch.allclose(
        siglip_loss(images, texts, *_scalars()), siglip_loss(texts, images, *_scalars())
    )


def test_permuting_the_pairs_changes_nothing():
    images, texts = _features()
    order = torch.randperm(len(images))
    assert torch.allclose(
        siglip_loss(images, texts, *_scalars()),
        siglip_loss(images[order], texts[order], *_scalars()),
    )


@pytest.mark.parametrize("extreme", [-200.0, -60.0, 60.0, 200.0])
def test_extreme_logits_have_exact_values_and_finite_gradients(extreme):
    """A saturated pair costs its logit, not log(1e-8); nothing overflows."""
    images = torch.tensor([[1.0, 0.0]], requires_grad=True)
    texts = torch.tensor([[1.0, 0.0]], requires_grad=True)
    scale, bias = _scalars(1.0, extreme - 1.0, torch.float32)
    loss = siglip_loss(images, texts, scale, bias)
    loss.backward()
    assert loss.item() == pytest.approx(softplus(-extreme), rel=1e-6)
    for tensor in (images, texts, scale, bias):
        assert torch.isfinite(tensor.grad).all()
    assert bias.grad.item() == pytest.approx(-1 / (1 + math.exp(extreme)), rel=1e-5)


def test_tiny_negative_derivatives_survive_a_half_precision_scaler():
    """At a logit of -20 a negative's derivative (2e-9) is below the smallest fp16 number."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float16, requires_grad=True)
    texts = images.detach().clone().requires_grad_()
    loss = siglip_loss(images, texts, torch.tensor(10.0), torch.tensor(-20.0))
    (loss * 2.0**20).backward()  # what a GradScaler does
    pull = 10 / 2 * 2.0**20 / (1 + math.exp(20.0))  # scale * W/N * sigmoid(-20) * the factor
    assert images.grad[0, 1].item() == pytest.approx(pull, rel=1e-2)


def test_autocast_does_not_reach_into_the_loss():
    arguments = [t.detach().float() for t in (*_features(), *_scalars())]
    expected = siglip_loss(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(siglip_loss(*arguments), expected)


def test_a_second_backward_gives_the_same_gradients():
    images, texts = _features()
    scale, bias = _scalars()
    loss = siglip_loss(images, texts, scale, bias)
    first = torch.autograd.grad(loss, (images, texts, scale, bias), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (images, texts, scale, bias))
    for one, three in zip(first, second, strict=True):
        assert torch.allclose(3 * one, three, rtol=1e-14)


def test_second_order_gradients_are_refused_not_wrong():
    images, texts = _features()
    loss = siglip_loss(images, texts, *_scalars())
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(loss, images, create_graph=True)


def test_no_bias_means_bias_zero():
    images, texts = _features()
    scale, _ = _scalars()
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert torch.equal(
        siglip_loss(images, texts, scale, None), siglip_loss(images, texts, scale, zero)
    )


def test_a_tile_off_the_diagonal_has_only_negatives():
    images, texts = (side.detach() for side in _features(3))
    scale, bias = (value.detach() for value in _scalars())
    tiles = SigmoidTiles(images, (3, 3), scale, bias)
    derivative = tiles.derivative(images, texts, diagonal=None)
    logits = 5.0 * images @ texts.T - 2.0
    assert tiles.sums().value.item() == pytest.approx(
        sum(softplus(z) for z in logits.flatten().tolist())
    )
    assert torch.allclose(derivative, torch.sigmoid(logits))


def test_reference_agrees_with_a_hand_counted_case():
    """Two pairs, similarities 1 on the diagonal and 0 off it, scale 2, bias -1."""
    eye = torch.eye(2)
    reference = sigmoid_loss_and_gradients(eye, eye, 2.0, -1.0)
    by_hand = (2 * math.log1p(math.exp(-1)) + 2 * math.log1p(math.exp(-1))) / 2
    assert reference["loss"].item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(5, 4)}, r"image_features \(6, 4\) and text_features \(5, 4\)"),
        ({"text": torch.zeros(6, 4)}, r"must have one dtype"),
        ({"scale": torch.ones(2)}, r"logit_scale \(2,\) must have one element"),
        ({"chunk_rows": 0}, r"chunk_rows \(0\) must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    images, texts = (side.detach() for side in _features())
    scale, bias = (value.detach() for value in _scalars())
    with pytest.raises(UserError, match=message):
        siglip_loss(
            images,
            change.get("text", texts),
            change.get("scale", scale),
            bias,
            chunk_rows=change.get("chunk_rows", 4),
        )


def _messages(rank, world_size):
    return _disagree(rank), _not_finite(rank)


def _disagree(rank):
    messages = []
    good = torch.eye(4)
    wide, double = torch.eye(4, 6), torch.eye(4, dtype=torch.float64)
    scalars = (torch.tensor(10.0), torch.tensor(-10.0))
    for odd in (wide, double, good.clone().requires_grad_()):
        features = odd if rank == 2 else good
        with pytest.raises(UserError) as caught:
            siglip_loss(features, features, *scalars, exchange="ring")
        messages.append(str(caught.value))
    # Frozen images here, frozen texts there: the one would send texts, the other images.
    sides = (good, good.clone().requires_grad_())
    with pytest.raises(UserError) as caught:
        siglip_loss(*(sides if rank == 2 else sides[::-1]), *scalars, exchange="ring")
    messages.append(str(caught.value))
    # The group still works afterwards.
    messages.append(siglip_loss(good, good, *scalars, exchange="ring").item())
    return messages


def _not_finite(rank):
    """What every rank is told when a row of rank 1 is nan, and when every rank has one."""
    scalars = (torch.tensor(10.0), torch.tensor(-10.0))
    loss = SigLipLoss()
    messages = []
    for is_bad in (rank == 1, True):
        texts = torch.eye(4)
        if is_bad:
            texts[2, 3] = torch.inf
        with pytest.raises(UserError) as caught:
            loss(torch.eye(4), texts, *scalars)
        messages.append(str(caught.value))
    return messages


@lru_cache
def messages_of_three_ranks():
    return run_ranks(_messages, 3)


def test_ranks_that_disagree_are_named_and_nothing_hangs():
    for (width, dtype, gradient, side, loss), _ in messages_of_three_ranks():
        assert width.startswith("rank 2 passes [float32 (*, 6)")
        assert dtype.startswith("rank 2 passes [float64 (*, 4)")
        assert gradient.startswith("rank 2 passes")
        assert "accumulators: none" in gradient
        assert side.startswith("rank 2 passes")
        assert "images travel" in side
        assert "texts travel" in side
        assert math.isfinite(loss)


def test_a_row_that_is_not_finite_is_named_on_every_rank():
    for rank, (_, (one, all_of_them)) in enumerate(messages_of_three_ranks()):
        assert one.startswith("rank 1 passes")
        assert "text_features row 2 is not finite" in one
        assert all_of_them == f"rank {rank}: text_features row 2 is not finite"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image", "rank 0: image_features row 3 is not finite"),
        ("scale", "rank 0: logit_scale is not finite"),
        ("bias", "rank 0: logit_bias is not finite"),
    ],
)
def test_what_is_not_finite_is_named_in_one_process(name, message):
    arguments = dict(zip(("image", "text", "scale", "bias"), _features() + _scalars(), strict=True))
    with torch.no_grad():
        arguments[name].view(-1)[-1 if name != "image" else 3 * 4] = torch.nan
    with pytest.raises(UserError, match=message):
        siglip_loss(*arguments.values())


def test_a_loss_that_overflows_is_named_at_the_next_call():
    images = torch.full((2, 4), 1e19)
    loss = SigLipLoss()
    assert not loss(images, -images, torch.tensor(10.0), torch.tensor(0.0)).isfinite()
    with pytest.raises(UserError, match="the loss of the step before was inf"):
        loss(torch.eye(2), torch.eye(2), torch.tensor(10.0), torch.tensor(0.0))
    unchecked = SigLipLoss(check_finite=False)
    for _ in range(2):
        unchecked(images, -images, torch.tensor(10.0), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("image", "text", "travels", "accumulators"),
    [
        (True, True, "text", 1),
        (True, False, "text", 0),
        (False, True, "image", 0),
        (False, False, "text", 0),
    ],
)
def test_the_side_without_accumulator_travels(monkeypatch, image, text, travels, accumulators):
    passes = []

    def record(columns, *, accumulators, **settings):
        passes.append((columns, accumulators))
        return prepare_exchange(columns, accumulators=accumulators, **settings)

    monkeypatch.setattr("dist_siglip.losses.ring_pass.prepare_exchange", record)
    images, texts = (
        side.detach().requires_grad_(wanted)
        for side, wanted in zip(_features(), (image, text), strict=True)
    )
    siglip_loss(images, texts, *_scalars())
    ((columns, specs),) = passes
    assert torch.equal(columns[0], images if travels == "image" else texts)
    assert (len(columns), len(specs)) == (1, accumulators)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_ids": torch.zeros(5, dtype=torch.int64)}, r"caption_ids \(5,\)"),
        ({"picture_ids": torch.zeros(5, dtype=torch.int64)}, r"picture_ids \(5,\)"),
        ({"caption_ids": torch.zeros(6)}, r"caption_ids \(6,\) \(torch.float32\) must be integers"),
        ({"duplicates": "both"}, r"duplicates \('both'\) must be one of positive, masked"),
    ],
)
def test_wrong_ids_are_named(change, message):
    with pytest.raises(UserError, match=message):
        siglip_loss(*_features(), *_scalars(), **change)


@pytest.mark.parametrize("kernel", ["triton", "eager"])
def test_a_gpu_is_never_waited_for(kernel, monkeypatch):
    """Fake CUDA tensors have no numbers: whatever would read one on the host raises."""
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        kernels = "dist_siglip.losses.kernels"
        monkeypatch.setattr(f"{kernels}.pair_terms._triton_obstacle", lambda *_: "")
        monkeypatch.setattr(f"{kernels}.triton_terms.launch", lambda *_, **__: None)
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            images, texts = (
                torch.empty(10, 8, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
            )
            scalars = [torch.tensor(5.0, device="cuda", requires_grad=True) for _ in range(2)]
            ids = torch.zeros(10, device="cuda", dtype=torch.int64)
            for duplicates in ("positive", "masked", "negative"):
                loss = siglip_loss(
                    images,
                    texts,
                    *scalars,
                    caption_ids=ids,
                    picture_ids=ids,
                    duplicates=duplicates,
                    chunk_rows=4,
                    kernel=kernel,
                )
            assert loss.device.type == "cuda"
            assert loss.requires_grad
            with pytest.raises(DataDependentOutputException):
                loss.item()
