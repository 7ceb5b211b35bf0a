"""The module wires: its loss is siglip_loss of its towers, and nothing is left out."""

import shutil

import pytest
import torch
from lightning.pytorch import Trainer

from dist_siglip.data import ImageTextBatch
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig, siglip_loss
from dist_siglip.module import SigLipModule
from dist_siglip.optim import OptimConfig
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of, write_config


def make_batch(num_pairs=4, num_padding=0):
    images, texts = inputs_of(ARCHITECTURES["clip"], num_pairs)
    valid = torch.arange(num_pairs) < num_pairs - num_padding
    ids = torch.arange(num_pairs)
    return ImageTextBatch(images, texts, ids, ids, valid, torch.zeros(num_pairs, dtype=torch.bool))


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])


class Batches(torch.utils.data.Dataset):
    def __init__(self, num_batches):
        self.batches = [make_batch() for _ in range(num_batches)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(num_batches):
    return torch.utils.data.DataLoader(Batches(num_batches), batch_size=None)


def trainer(tmp_path, **settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **settings,
    )


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]


def test_the_training_loss_is_siglip_loss_of_the_towers(model, tmp_path):
    module = SigLipModule(model, optim=OptimConfig(learning_rate=1e-9))
    data = loader(1)
    images, texts, *_ = data.dataset.batches[0]
    with torch.no_grad():
        expected = siglip_loss(*module.towers(images, texts), *module.logits())
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert run.callback_metrics["train/logit_scale"].item() == pytest.approx(10, rel=1e-6)
    assert run.callback_metrics["train/relative_bias"].item() == pytest.approx(1, rel=1e-6)
    assert run.callback_metrics["train/grad_norm"].item() > 0


def test_every_parameter_learns(model, tmp_path):
    module = SigLipModule(model, optim=OptimConfig(learning_rate=0.1))
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(tmp_path, max_steps=2).fit(module, loader(2))
    stuck = [n for n, value in module.named_parameters() if torch.equal(value, before[n])]
    assert stuck == []
    assert {"logits.log_scale", "logits.logit_bias"} < set(before)


def test_gradients_are_clipped_to_the_global_norm(model, tmp_path):
    module = SigLipModule(model)
    norms = []

    class Watch(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return loss

    optimizer = Watch(module.parameters(), lr=1e-4)
    module.configure_optimizers = lambda: optimizer
    module._log_training = lambda *arguments: None
    trainer(tmp_path, max_steps=2, gradient_clip_val=0.01).fit(module, loader(2))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_start_values_are_the_settings_then_the_weights_then_ten(model, tmp_path):
    fresh = SigLipModule(model)
    assert [round(value.item(), 4) for value in fresh.logits()] == [10, -10]
    told = SigLipModule(model, logits=LogitConfig(start_scale=20.0, start_bias=-5.0))
    assert [round(value.item(), 4) for value in told.logits()] == [20, -5]
    network = network_of(ARCHITECTURES["siglip"])
    torch.nn.init.constant_(network.logit_scale, 3.0)
    torch.nn.init.constant_(network.logit_bias, -7.0)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    config = write_config(tmp_path / "siglip.json", ARCHITECTURES["siglip"])
    loaded = SigLipModule(config, str(tmp_path / "weights.pt"))
    scale, bias = loaded.logits()
    assert scale.item() == pytest.approx(torch.tensor(3.0).exp().item(), rel=1e-5)
    assert bias.item() == -7


def test_validation_leaves_out_padding_and_equals_the_training_loss(model, tmp_path):
    """Three valid pairs and one of padding: the loss of a batch of three."""
    module = SigLipModule(model)
    data = loader(1)
    data.dataset.batches = [make_batch(4, num_padding=1)]
    images, texts, *_ = data.dataset.batches[0]
    run = trainer(tmp_path)
    (metrics,) = run.validate(module, data, verbose=False)
    with torch.no_grad():
        features = module.towers(images[:3], texts[:3])
        expected = siglip_loss(*features, *module.logits())
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.last_evaluation.metrics["gallery_pairs"] == 3


def test_autocast_sends_features_in_the_precision_of_the_towers(model, tmp_path):
    module = SigLipModule(model)
    seen = []
    module.loss.register_forward_pre_hook(lambda m, args: seen.extend(a.dtype for a in args[:2]))
    trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(module, loader(1))
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_towers_give_the_same_features(model):
    batch = make_batch()
    plain = SigLipModule(model).eval()
    compiled = SigLipModule(model, compile_towers=True).eval()
    compiled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(batch.images, batch.texts)
        for ours, theirs in zip(compiled(batch.images, batch.texts), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_settings_that_cannot_work_are_named(model, tmp_path):
    module = SigLipModule(model)
    with pytest.raises(UserError, match=r"gradient_clip_algorithm \(value\) must be norm"):
        trainer(tmp_path, max_steps=1, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(
            module, loader(1)
        )
    with pytest.raises(UserError, match=r"max_steps \(-1\) must be at least 1"):
        trainer(tmp_path, max_epochs=1).fit(SigLipModule(model), loader(1))
