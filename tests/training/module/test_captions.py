"""Several captions of each pair in one step: the mean of their losses, one pass of each tower."""

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.losses import SigLipLoss
from dist_siglip.losses.arguments import call_loss, ids_for
from dist_siglip.objectives import Captioning
from dist_siglip.training.callbacks import SkipBadSteps
from dist_siglip.training.module.captions import caption_weights_of, loss_of_captions
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.optim.step_check import StepCheck
from tests.support.caption_ranks import (
    BROKEN,
    CASES,
    LAYOUTS,
    WEIGHTS,
    Step,
    batch_of,
    gradients_of,
    sharded_and_not,
)
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


WRONG = [("sigmoid", None, broken) for broken in BROKEN]


@lru_cache
def results_of(world_size, model):
    if world_size == 1:
        return [gradients_of(0, 1, model, CASES)]
    return run_ranks(gradients_of, world_size, model, CASES + WRONG)


def worst(found, expected):
    return max(
        ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
        if value.abs().max() > 0
    )


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process_at_any_micro_batch(world_size, model):
    expected = dict(zip(CASES, results_of(1, model)[0], strict=True))
    for found in results_of(world_size, model):
        for case, ours in zip(CASES, found, strict=False):
            theirs = expected[case[0], None, ""]
            assert ours.keys() == theirs.keys()
            assert worst(ours, theirs) < 1e-10, case


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_comparison_rejects_broken_variants(world_size, model):
    expected = results_of(1, model)[0][0]
    for broken, found in zip(BROKEN, results_of(world_size, model)[0][len(CASES) :], strict=True):
        assert worst(found, expected) > 1e-3, broken


def test_loss_and_gradients_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(3)
    batch = batch_of(5)
    sides = torch.randn(15, 4, generator=generator, dtype=torch.float64)
    images, texts = (
        rows.requires_grad_() for rows in nn.functional.normalize(sides).split([5, 10])
    )
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -2.0))
    found = loss_of_captions(
        SigLipLoss(duplicates="positive"),
        *(images, texts, scale, bias),
        batch=batch,
        weights=WEIGHTS,
        nonfinite="raise",
    )
    found.loss.backward()
    parts = [
        sigmoid_loss_and_gradients(
            *(images.detach(), rows.detach(), 5.0, -2.0),
            ids=torch.stack([ids, batch.picture_ids], dim=1),
            duplicates="positive",
        )
        for rows, ids in zip(
            texts.split(5), (batch.caption_ids, batch.more_caption_ids[:, 0]), strict=True
        )
    ]

    def mean(name):
        return (parts[0][name] + 3 * parts[1][name]) / 4

    for ours, name in ((found.loss, "loss"), (images.grad, "image"), (scale.grad, "scale")):
        assert torch.allclose(ours.detach(), mean(name), rtol=1e-12, atol=1e-14)
    assert torch.allclose(bias.grad, mean("bias"), rtol=1e-12)
    by_text = torch.cat([parts[0]["text"], 3 * parts[1]["text"]]) / 4
    assert torch.allclose(texts.grad, by_text, rtol=1e-12, atol=1e-14)
    assert found.duplicate_pairs == parts[0]["duplicates"] + parts[1]["duplicates"] == 4
    for part, name in zip(parts, WEIGHTS, strict=True):
        assert torch.allclose(found.terms[f"pair_loss_{name}"], part["loss"], rtol=1e-12)


def test_a_step_is_that_of_separate_losses_with_a_pass_each(model):
    joined, separate = Step(model, "sigmoid", None, ""), Step(model, "sigmoid", None, "")
    batch, passes = batch_of(), []
    block = joined.towers.clip.text.transformer.resblocks[0]
    block.register_forward_hook(lambda *_: passes.append("text"))
    joined.towers.clip.visual.trunk.register_forward_hook(lambda *_: passes.append("image"))
    joined(batch).backward()
    assert passes == ["image", "text"]
    losses = []
    for texts, ids in (
        (batch.texts, batch.caption_ids),
        (batch.more_texts[:, 0], batch.more_caption_ids[:, 0]),
    ):
        features = separate.towers(batch.images, texts)
        chosen = ids_for(separate.loss, ids, batch.picture_ids)
        losses.append(separate.loss(*features, *separate.logits(), **chosen))
    ((losses[0] + 3 * losses[1]) / 4).backward()
    expected = {name: parameter.grad for name, parameter in separate.named_parameters()}
    assert worst({n: p.grad for n, p in joined.named_parameters()}, expected) < 1e-10


def test_of_one_caption_the_loss_is_itself_to_the_bit():
    rows = nn.functional.normalize(torch.randn(2, 5, 4))
    batch = batch_of(5)._replace(more_texts=None, more_caption_ids=None)
    loss = SigLipLoss(duplicates="masked")
    found = []
    for weights in (None, {}, {"alt": 0.3}):
        images, texts = (each.clone().requires_grad_() for each in rows)
        scale = torch.tensor(5.0, requires_grad=True)
        arguments = (loss, images, texts, scale, torch.tensor(-2.0))
        if weights is None:
            ids = ids_for(loss, batch.caption_ids, batch.picture_ids)
            result = call_loss(*arguments, ids=ids, nonfinite="raise")
        else:
            result = loss_of_captions(*arguments, batch=batch, weights=weights, nonfinite="raise")
        result.loss.backward()
        found.append((result.loss.detach(), images.grad, texts.grad, scale.grad))
        assert not result.terms
    for each in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(each, found[0], strict=True))
    assert batch.all_texts() is batch.texts


def train(model, folder, num_steps=3, start=None, done=0, **settings):
    """A run on batches with two captions of each pair; its module, trainer, and passes."""
    trainer_settings = settings.pop("trainer", {})
    module = locked_module(model, **settings)
    module.caption_weights = WEIGHTS
    passes = []
    clip = module.towers.clip
    for name, block in (
        ("image", clip.visual.trunk.blocks[0]),
        ("text", clip.text.transformer.resblocks[0]),
    ):
        block.register_forward_hook(lambda *_, name=name: passes.append(name))
    batches = [batch_of(4, seed, torch.float32) for seed in range(num_steps + 8)][done:]
    trainer = fit(
        *(module, folder, batches),
        ckpt_path=start,
        **{"max_steps": num_steps, "gradient_clip_val": 1.0, **trainer_settings},
    )
    return module, trainer, passes


def test_a_run_encodes_pictures_once_and_all_captions_in_one_pass(model, tmp_path):
    _, trainer, passes = train(model, tmp_path, 1)
    assert sorted(passes) == ["image", "text"]
    logged = trainer.callback_metrics
    whole = logged["train/loss"]
    parts = [logged[f"train/pair_loss_{name}"].item() for name in WEIGHTS]
    assert whole.item() == pytest.approx((parts[0] + 3 * parts[1]) / 4, rel=1e-6)
    assert parts[0] != parts[1]
    # Four pairs by two: two passes of pictures and four of captions, each made again in backward.
    for objectives in (None, [Captioning()]):
        _, _, passes = train(model, tmp_path, 1, micro_batch_size=2, objectives=objectives)
        assert passes.count("image") == 4
        assert passes.count("text") == 8
    _, trainer, passes = train(model, tmp_path, 1, objectives=[Captioning()])
    assert sorted(passes) == ["image", "text"]
    assert trainer.callback_metrics["train/pair_loss"] == pytest.approx(whole.item(), rel=1e-6)


def test_a_run_that_skips_bad_steps_skips_one_whose_second_caption_is_not_finite(model, tmp_path):
    """As where a text tower overflows on a caption."""
    module = locked_module(model)
    module.towers.clip.text.register_forward_hook(
        lambda tower, inputs, rows: torch.where(
            torch.arange(len(rows))[:, None] == 5, torch.nan, rows
        )
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    guard = SkipBadSteps(abort_after=9)
    batches = [batch_of(4, seed, torch.float32) for seed in range(9)]
    fit(module, tmp_path, batches, max_steps=1, callbacks=[guard])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_objective_reads_the_first_caption(model):
    module = locked_module(model, objectives=[Captioning()])
    nn.init.normal_(module.objectives["captioning"].output.weight, std=0.3)
    batch = batch_of(4, dtype=torch.float32)
    alone = batch._replace(more_texts=None, more_caption_ids=None)
    totals = [
        encode_with_terms(module.towers, module.objectives, each, 0, 4)[1]["captioning"]
        for each in (batch, alone)
    ]
    assert torch.equal(totals[0]["caption_loss"].total, totals[1]["caption_loss"].total)


def test_a_run_that_is_stopped_goes_on_to_the_bit(model, tmp_path):
    whole = train(model, tmp_path, 3)[0].state_dict()
    _, trainer, _ = train(model, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    module, _, _ = train(model, tmp_path, 3, start=tmp_path / "1.ckpt", done=1)
    assert all(torch.equal(value, whole[name]) for name, value in module.state_dict().items())


def test_under_autocast_the_loss_is_near_that_without(model, tmp_path):
    exact, rounded = (
        train(model, tmp_path, 1, trainer={"precision": precision})[1].callback_metrics[
            "train/loss"
        ]
        for precision in ("32-true", "bf16-mixed")
    )
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded != exact


@pytest.mark.e2e
def test_sharded_towers_that_encode_again_train_alike(model, tmp_path):
    for replicated, sharded in run_ranks(sharded_and_not, 2, model, tmp_path):
        for name, value in replicated.items():
            assert torch.allclose(sharded[name], value, rtol=1e-4, atol=1e-6), name


def test_a_step_check_names_the_pair_of_a_second_caption_that_is_not_finite():
    texts = torch.ones(6, 2)
    texts[4] = torch.nan
    check = StepCheck()
    check.look(torch.tensor(1.0), torch.ones(3, 2), texts, torch.arange(3))
    assert check._bad_rows.tolist() == [False, True, False]


class Distilled(SigLipLoss):
    uses_teachers = True


def test_what_sees_one_caption_refuses_several_in_a_line():
    data = SimpleNamespace(captions=CaptionRule(members=("json",), weights=WEIGHTS))
    assert caption_weights_of(data, SigLipLoss()) == WEIGHTS
    assert caption_weights_of(SimpleNamespace(), SigLipLoss()) == {}
    for loss, words in ((None, "this module takes one"), (Distilled(), "its teachers takes one")):
        with pytest.raises(UserError, match=words) as caught:
            caption_weights_of(data, loss)
        assert "\n" not in str(caught.value)
    one = SimpleNamespace(captions=CaptionRule(members=("json",), weights={"alt": 2.0}))
    assert caption_weights_of(one, Distilled()) == {"alt": 2.0}
