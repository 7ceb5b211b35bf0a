"""The module wires: its loss is siglip_loss of its towers, and nothing is left out."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig, LossOutput, SigLipLoss, siglip_loss
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.optim import OptimConfig
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked
from tests.support.shards import caption, encode, picture, write_shard
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


class Recorder(nn.Module):
    """siglip_loss that keeps what it was called with."""

    def __init__(self, *, uses_caption_ids=False, uses_logit_bias=True):
        super().__init__()
        self.uses_caption_ids, self.uses_logit_bias = uses_caption_ids, uses_logit_bias
        self.calls = []

    def forward(self, images, texts, scale, bias, **ids):
        self.calls.append((bias, ids))
        if ids:
            equal = ids["caption_ids"][:, None] == ids["caption_ids"][None, :]
            duplicates = equal.sum() - len(equal)
        loss = siglip_loss(images, texts, scale, bias if self.uses_logit_bias else None)
        return LossOutput(loss, duplicates) if ids else loss


def test_caption_ids_go_to_a_loss_that_uses_them_and_duplicates_are_logged(model, tmp_path):
    data = loader(1)
    data.dataset.batches = [make_batch()._replace(caption_ids=torch.tensor([5, 8, 5, 5]))]
    recorder = Recorder(uses_caption_ids=True)
    run = trainer(tmp_path, max_steps=1)
    run.fit(SigLipModule(model, loss=recorder), data)
    ((_, ids),) = recorder.calls
    assert ids["caption_ids"].tolist() == [5, 8, 5, 5]
    assert run.callback_metrics["train/duplicate_captions"].item() == 6


@pytest.mark.parametrize("loss", [SigLipLoss(duplicates="positive"), None])
def test_pictures_are_identified_in_training_only_if_the_loss_asks(model, tmp_path, loss):
    """Six pictures with five rows each; a validation asks in any case."""
    members = [
        (f"{i:03d}", {"png": encode(picture(i % 6)), "txt": caption(i).encode()}) for i in range(30)
    ]
    shard = str(write_shard(tmp_path / "a.tar", members))
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            pictures = batch.sample_ids % 6
            equal = int((pictures[:, None] == pictures).sum()) - len(pictures)
            counted = trainer.callback_metrics.get("train/duplicate_captions")
            seen.append((equal, counted, torch.equal(batch.picture_ids, batch.sample_ids)))

    module = SigLipModule(model, loss=loss)
    data = ImageTextDataModule(
        train_shards=shard,
        val_shards=shard,
        inputs=module.inputs,
        global_batch_size=16,
        workers_per_rank=0,
    )
    run = trainer(
        tmp_path, max_epochs=-1, max_steps=1, callbacks=[Look()], use_distributed_sampler=False
    )
    run.fit(module, datamodule=data)
    ((equal, counted, are_own),) = seen
    assert equal > 0
    assert (counted is None, are_own) == (loss is None, loss is None)
    assert loss is None or counted == equal
    run.validate(module, datamodule=data, verbose=False)
    assert module.last_evaluation.metrics["distinct_pictures"] == 6


def test_other_losses_get_no_ids_and_no_duplicates_are_logged(model, tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, max_steps=1)
    run.fit(SigLipModule(model, loss=recorder), loader(1))
    assert [ids for _, ids in recorder.calls] == [{}]
    assert "train/duplicate_captions" not in run.callback_metrics


@pytest.mark.parametrize("parameterization", ["absolute", "relative"])
def test_a_bias_that_the_loss_does_not_use_is_frozen_and_said(
    model, tmp_path, parameterization, caplog
):
    """DDP stops at a trainable parameter without a gradient."""
    caplog.set_level("INFO", logger="dist_siglip")
    recorder = Recorder(uses_logit_bias=False)
    logits = LogitConfig(bias_parameterization=parameterization)
    module = SigLipModule(model, loss=recorder, logits=logits)
    name = "logit_bias" if parameterization == "absolute" else "relative_bias"
    assert f"Recorder uses no bias: {name} is frozen" in caplog.text
    trainer(tmp_path, max_steps=1).fit(module, loader(1))
    frozen = [n for n, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"logits.{name}"]
    ((bias, _),) = recorder.calls
    assert not bias.requires_grad
    with pytest.raises(UserError, match=r"loss \(Recorder\) uses no bias"):
        module.calibrate(torch.eye(2), torch.eye(2), torch.arange(2))


@pytest.mark.e2e
def test_a_softmax_loss_trains_under_ddp(tmp_path):
    """open_clip#1076: a bias without a gradient stops DDP."""
    done = run_forked(
        "fit",
        "--config",
        write_settings(tmp_path),
        "--model.loss=dist_siglip.losses.ClipLoss",
        "--trainer.devices=2",
        "--trainer.max_steps=2",
        world_size=2,
    )
    assert done.returncode == 0, done.stderr
    assert "ClipLoss uses no bias: logit_bias is frozen" in done.stderr


def checkpoint_of(module, path, tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader(1))
    run.save_checkpoint(path)
    return str(path)


def test_another_global_batch_than_the_weights_were_trained_with_is_warned_of(
    model, tmp_path, caplog
):
    trained = checkpoint_of(
        SigLipModule(model, global_batch_size=4), tmp_path / "trained.ckpt", tmp_path
    )

    def warnings(**settings):
        caplog.clear()
        SigLipModule(model, trained, **settings)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    (warning,) = warnings(global_batch_size=512)
    assert "trained.ckpt) was trained with a global batch of 4, this run has 512" in warning
    assert "the best bias is about -4.9 away; run dist-siglip calibrate" in warning
    assert warnings(global_batch_size=4) == []
    assert warnings() == []
    # Someone who sets the bias, or calibrates, has answered the warning.
    assert warnings(global_batch_size=512, logits=LogitConfig(start_bias=-14.0)) == []
    assert warnings(global_batch_size=512, calibration_pairs=4096) == []
    assert warnings(global_batch_size=512, loss=Recorder(uses_logit_bias=False)) == []


def test_a_checkpoint_loaded_by_the_trainer_is_compared_too(model, tmp_path, caplog):
    trained = checkpoint_of(
        SigLipModule(model, global_batch_size=4), tmp_path / "trained.ckpt", tmp_path
    )
    module = SigLipModule(model, global_batch_size=8)
    trainer(tmp_path).validate(module, loader(1), ckpt_path=trained, verbose=False)
    assert "the checkpoint was trained with a global batch of 4, this run has 8" in caplog.text


def test_calibrating_a_run_needs_data_that_can_be_read_apart(model, tmp_path):
    module = SigLipModule(model, global_batch_size=4, calibration_pairs=64)
    with pytest.raises(UserError, match=r"calibration_pairs \(64\) needs an ImageTextDataModule"):
        trainer(tmp_path, max_steps=1).fit(module, loader(1))
    with pytest.raises(UserError, match=r"global_batch_size \(null\) must be known"):
        SigLipModule(model).calibrate(torch.eye(2), torch.eye(2), torch.arange(2))


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_towers_give_the_same_features(model):
    batch = make_batch()
    plain = SigLipModule(model).eval()
    compiled = SigLipModule(model, compile_towers=True).eval()
    compiled.configure_model()  # as the Trainer does
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
    with pytest.raises(UserError, match=r"total_steps \(-1\) must be > 0; set max_steps"):
        trainer(tmp_path, max_epochs=1).fit(SigLipModule(model), loader(1))


def test_a_checkpoint_of_weights_alone_has_no_optimizer(model, tmp_path):
    run, module = trainer(tmp_path, max_steps=1), SigLipModule(model)
    run.fit(module, loader(1))
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in saved
    assert set(saved["state_dict"]) == set(module.state_dict())


def test_the_state_of_the_optimizer_stands_under_names(model, tmp_path):
    run, module = trainer(tmp_path, max_steps=1), SigLipModule(model)
    run.fit(module, loader(1))
    run.save_checkpoint(tmp_path / "all.ckpt")
    (state,) = torch.load(tmp_path / "all.ckpt", weights_only=True)["optimizer_states"]
    names = {name for name, _ in module.named_parameters()}
    assert set(state["state"]) == names
    assert {name for group in state["param_groups"] for name in group["params"]} == names
