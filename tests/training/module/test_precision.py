"""Training in half precision: what stays in float32, and how far the runs are from each other."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import SigLipLoss
from dist_siglip.models import build_dual_encoder
from dist_siglip.training.optim import OptimConfig
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients
from tests.support.sharded_ranks import train, train_cases
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]
# Rounding of bfloat16 and float16 over three steps of a tiny model, several times what was seen.
TOLERANCE = {"bf16-mixed": 0.05, "bf16-true": 0.05, "16-mixed": 0.01}


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


class WatchedLoss(SigLipLoss):
    """Keeps what it was given and what it gave."""

    def forward(self, image_features, text_features, logit_scale, logit_bias, **others):
        found = super().forward(image_features, text_features, logit_scale, logit_bias, **others)
        self.given = (image_features, text_features, logit_scale, logit_bias)
        self.found = found.detach()
        return found


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_losses_are_near_those_of_float32(model, tmp_path, precision):
    exact = train(model, tmp_path, {})
    rounded = train(model, tmp_path, {"trainer": {"precision": precision}})
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=TOLERANCE[precision])
    assert rounded["losses"] != exact["losses"]


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_scale_bias_and_loss_stay_in_float32(model, tmp_path, precision):
    module = locked_module(model, loss=WatchedLoss())
    fit(module, tmp_path, batches_of(2), precision=precision, gradient_clip_val=1.0)
    image_features, text_features, scale, bias = module.loss.given
    assert {p.dtype for p in module.logits.parameters()} == {torch.float32}
    assert scale.dtype == bias.dtype == module.loss.found.dtype == torch.float32
    towers = {p.dtype for p in module.towers.parameters()}
    assert towers == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    rows = (features.detach() for features in (image_features, text_features))
    expected = sigmoid_loss_and_gradients(*rows, scale.item(), bias.item())
    assert module.loss.found.item() == pytest.approx(expected["loss"].item(), rel=5e-3)


def test_an_encoder_in_half_precision_takes_pixels_in_float32(model):
    encoder = build_dual_encoder(model).encoder.eval()
    images, texts = inputs_of(ARCHITECTURES["siglip"])
    exact = encoder(images, texts)
    for found, expected in zip(encoder.bfloat16()(images, texts), exact, strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=0.05)


def test_clipping_under_a_gradient_scaler_sees_the_gradients_themselves(model, tmp_path):
    """The norm is logged before clipping; scaled, it would be 256 times as large."""
    exact = train(model, tmp_path, {}, num_steps=1)
    scaled = train(model, tmp_path, {"trainer": {"precision": "16-mixed"}}, num_steps=1)
    assert scaled["norm"] == pytest.approx(exact["norm"], rel=0.02)


def test_a_fused_optimizer_of_ones_own_is_refused_under_a_scaler(model, tmp_path):
    def fused(groups):
        return torch.optim.AdamW(groups, fused=True)

    module = locked_module(model, optim=OptimConfig(optimizer=fused))
    with pytest.raises(UserError, match=r"optimizer \(AdamW\) is fused.*fused: false"):
        fit(module, tmp_path, batches_of(1), precision="16-mixed")


@pytest.mark.e2e
def test_two_ranks_train_as_one_process_does_in_every_precision(model, tmp_path):
    """DDP and FSDP2; float16 with DDP only. Losses to the tolerance of the precision."""
    cases = [
        {"trainer": {"precision": precision}, "shard": sharding}
        for precision in TOLERANCE
        for sharding in ((None,) if precision == "16-mixed" else (None, {}))
    ]
    ranks = run_ranks(train_cases, 2, model, str(tmp_path), cases)
    for number, case in enumerate(cases):
        precision = case["trainer"]["precision"]
        alone = train(model, tmp_path, {"trainer": case["trainer"]})
        for rank in ranks:
            found = rank[number]
            assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE[precision])
            assert found["norm"] == pytest.approx(alone["norm"], rel=0.1)
