"""Micro-batches change memory and time of a step, and no number of it."""

import json
import subprocess
import sys
from functools import lru_cache, partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.models import DualEncoder, encode_in_micro_batches
from dist_siglip.models import dual_encoder as micro_batches
from dist_siglip.models.dual_encoder import CachedEncoding
from dist_siglip.runs import describe_differences
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.optim import OptimConfig
from tests.support.command import REPOSITORY, environment
from tests.support.micro_batch_ranks import (
    LAYOUTS,
    MICRO_BATCH_SIZES,
    SMALL,
    Step,
    ddp_gradients,
    gradients,
    make_inputs,
)
from tests.support.processes import run_ranks
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of, write_config


@lru_cache
def results_of(world_size):
    return [ddp_gradients(0, 1)] if world_size == 1 else run_ranks(ddp_gradients, world_size)


@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.parametrize("micro_batch_size", MICRO_BATCH_SIZES)
def test_gradients_are_those_of_the_whole_batch_on_one_process(world_size, micro_batch_size):
    expected = results_of(1)[0][None]
    assert {"logits.log_scale", "logits.logit_bias"} < set(expected)
    for by_size in results_of(world_size):
        found = by_size[micro_batch_size]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error < 1e-12, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_comparison_rejects_the_loss_of_each_micro_batch_alone(world_size):
    """What gradient accumulation would compute."""
    images, texts = make_inputs(6)
    step = Step(None)
    parts = zip(images.split(2), texts.split(2), strict=True)
    (sum(step(*part) for part in parts) / 3).backward()
    expected = results_of(world_size)[0][2]
    for name, value in gradients(step).items():
        assert (value - expected[name]).abs().max() > 1e-3 * expected[name].abs().max(), name


def random_step(checkpoint, monkeypatch, *, autocast=False):
    """Gradients of a step with dropout in the text tower and patch dropout in the image tower.

    Args:
        checkpoint: of the micro-batches; None encodes each side for a backward pass of its own.
    """
    monkeypatch.setattr(micro_batches, "checkpoint", checkpoint)
    torch.manual_seed(1)
    architecture = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_dropout": 0.5}}
    encoder = DualEncoder(network_of(architecture))
    encoder.clip.ln_final = nn.Sequential(encoder.clip.ln_final, nn.Dropout(0.3))
    encoder.train()
    images, texts = make_inputs(6)
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if checkpoint is None:
            sides = ((encoder.encode_image, images.float()), (encoder.encode_text, texts))
            cached = [CachedEncoding(encode, (inputs,), 2) for encode, inputs in sides]
            features = [each.features for each in cached]
        else:
            features = encode_in_micro_batches(encoder, images.float(), texts, 2)
    loss = siglip_loss(*features, torch.tensor(5.0), torch.tensor(-2.0))
    torch.manual_seed(99)  # whatever the loss or another rank did to the generator
    loss.backward()
    if checkpoint is None:
        begun, state = [], torch.get_rng_state()
        for each in cached:
            each.backward(begun.append)
        assert begun == [False, False, True] * 2
        assert torch.equal(torch.get_rng_state(), state)
    return [parameter.grad for parameter in encoder.parameters()]


def kept(encode, part, **_):
    """Encode once and keep all activations: what the checkpoint must not differ from."""
    return encode(part)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_patch_dropout_and_autocast_are_replayed(monkeypatch, autocast):
    ours = random_step(micro_batches.checkpoint, monkeypatch, autocast=autocast)
    assert equal(ours, random_step(kept, monkeypatch, autocast=autocast))


@pytest.mark.parametrize("autocast", [False, True])
def test_they_are_replayed_where_each_micro_batch_goes_backward_by_itself(monkeypatch, autocast):
    """Sums over micro-batches are in another order, so the last digits may differ."""
    expected = random_step(kept, monkeypatch, autocast=autocast)
    other = random_step(kept, monkeypatch, autocast=not autocast)
    found = random_step(None, monkeypatch, autocast=autocast)
    errors = [
        max(float((a - b).norm() / b.norm()) for a, b in zip(each, expected, strict=True))
        for each in (found, other)
    ]
    assert errors[0] < (0.01 if autocast else 1e-5) < errors[1]


def test_the_comparison_rejects_other_random_numbers_and_another_precision(monkeypatch):
    exact = random_step(kept, monkeypatch)
    real = torch.utils.checkpoint.checkpoint

    def careless(encode, part, **settings):
        return real(encode, part, use_reentrant=False, preserve_rng_state=False)

    assert not equal(exact, random_step(careless, monkeypatch))
    assert not equal(exact, random_step(kept, monkeypatch, autocast=True))


def test_backward_encodes_one_micro_batch_at_a_time_again():
    calls = []
    encoder = DualEncoder(network_of(SMALL)).train()

    def record(name, encode, part):
        calls.append((name, part.flatten()[0].item(), len(part)))
        return encode(part)

    for name in ("encode_image", "encode_text"):
        setattr(encoder, name, partial(record, name, getattr(encoder, name)))
    images, texts = make_inputs(5)
    features = encode_in_micro_batches(encoder, images.float(), texts, 2)
    forward = list(calls)
    assert [(name, size) for name, _, size in forward] == [
        (name, size) for name in ("encode_image", "encode_text") for size in (2, 2, 1)
    ]
    siglip_loss(*features, torch.tensor(5.0), torch.tensor(-2.0)).backward()
    assert calls[len(forward) :] == forward[::-1]


def test_a_single_part_and_an_evaluation_are_encoded_once(monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError("encoded twice")

    monkeypatch.setattr(micro_batches, "checkpoint", never)
    encoder = DualEncoder(network_of(SMALL))
    images, texts = make_inputs(5)
    expected = encoder(images.float(), texts)
    found = [encode_in_micro_batches(encoder, images.float(), texts, 5)]
    with torch.no_grad():
        found.append(encode_in_micro_batches(encoder, images.float(), texts, 2))
    for features in found:
        for ours, theirs in zip(features, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def train(model, folder, batches, **settings):
    torch.manual_seed(3)
    module = SigLipModule(model, optim=OptimConfig(learning_rate=0.01, epsilon=0.01), **settings)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_run_ends_with_the_same_weights(tmp_path, gradient_checkpointing):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    ids, no = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    inputs = [inputs_of(ARCHITECTURES["clip"], 4) for _ in range(2)]
    batches = [ImageTextBatch(*pairs, ids, ids, ~no, no) for pairs in inputs]
    settings = {"gradient_checkpointing": gradient_checkpointing}
    expected = train(model, tmp_path, batches, **settings)
    found = train(model, tmp_path, batches, micro_batch_size=3, **settings)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_batch_norm_is_refused_by_name(tmp_path):
    model = write_config(tmp_path / "resnet.json", ARCHITECTURES["resnet"])
    with pytest.raises(UserError, match=r"micro_batch_size \(2\) .* BatchNorm \(clip\.visual\.bn1"):
        SigLipModule(model, micro_batch_size=2)
    SigLipModule(model)


def test_a_micro_batch_needs_a_row(tmp_path):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    with pytest.raises(UserError, match=r"micro_batch_size \(0\) must be at least 1"):
        SigLipModule(model, micro_batch_size=0)


def test_a_run_goes_on_with_another_size():
    before, after = {"model": {"micro_batch_size": None}}, {"model": {"micro_batch_size": 64}}
    assert describe_differences(before, after) == []


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_32768_pairs_train_in_the_memory_of_512_and_the_features():
    """Peak of the process against the bytes autograd would keep, counted on one micro-batch."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.micro_memory", "32768", "512"],
        capture_output=True,
        text=True,
        # Larger blocks go back to the system at once: the peak is that of living tensors.
        env={**environment(), "MALLOC_MMAP_THRESHOLD_": "262144"},
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mib = json.loads(done.stdout)
    # The whole batch at once would keep this, and the step stays far below it.
    assert mib["activations_of_all"] > 1000
    allowed = mib["activations_of_micro_batch"] + mib["features_and_gradients"] + mib["loss_tiles"]
    assert mib["peak"] < allowed < mib["activations_of_all"] / 10, mib
