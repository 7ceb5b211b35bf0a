"""Training on pictures of any shape: ranks, micro-batches, lengths, resume, and a whole run."""

import json
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from dist_siglip.cli import main
from dist_siglip.cli.run.training import train as train_run
from dist_siglip.data.order.position import SequenceLengths
from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.data.samples.patches import PatchBudget, padding_of, patch_mask, unpack
from dist_siglip.doctor.command import _picture_size
from dist_siglip.errors import UserError
from dist_siglip.losses import DistillationLoss
from dist_siglip.models import build_dual_encoder
from dist_siglip.objectives import Captioning, Objective, Rows, Term
from dist_siglip.runs import describe_differences
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import SigLipModule, load_trained
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.objective_measures import ObjectiveMeasures
from dist_siglip.training.module.objectives import build_objectives
from dist_siglip.training.module.teachers import TeacherConfig
from tests.support.command import write_settings
from tests.support.naflex import FIXED, GRIDS, packed_of, write_models
from tests.support.naflex_ranks import (
    LAYOUTS,
    MICRO_BATCH_SIZES,
    batch_of,
    batches_of,
    gradients_of,
    rows_of,
    start_of,
    train,
)
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.shards import tiny_inputs, write_shards
from tests.support.tiny_models import write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("naflex"))


@lru_cache
def results_of(world_size, models):
    if world_size == 1:
        return [gradients_of(0, 1, models)]
    return run_ranks(gradients_of, world_size, models)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process_at_any_micro_batch(world_size, models):
    expected = results_of(1, models)[0][0]
    assert "towers.clip.visual.trunk.embeds.pos_embed" in expected
    for cases in results_of(world_size, models):
        assert len(cases) == len(MICRO_BATCH_SIZES)
        for found in cases:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                error = (found[name] - value).abs().max() / value.abs().max()
                assert error < 1e-10, name


class Passes(Callback):
    """Keeps the rows and lengths that the image tower was given at once."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        proj = pl_module.towers.clip.visual.trunk.embeds.proj
        proj.register_forward_hook(lambda _, inputs, out: self.seen.append(tuple(out.shape[:2])))


def test_a_budget_of_patches_takes_fewer_rows_of_longer_pictures(models, tmp_path):
    settings = {"pretrained": models[1], "num_patches": 64}
    states = []
    for budget, expected in (
        (None, {(6, 64), (6, 80), (6, 200)}),
        (200, {(3, 64), (2, 80), (1, 200)}),
    ):
        passes = Passes()
        module = locked_module(models[0], micro_batch_patches=budget, **settings)
        batches = [batch_of(n, seed) for seed, n in enumerate((64, 80, 200, 64, 64))]
        fit(module, tmp_path, batches, callbacks=[passes], max_steps=3)
        assert set(passes.seen) == expected
        assert all(budget is None or rows * length <= budget for rows, length in passes.seen)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    assert worst_error(states[1], states[0], start_of(models)) < 1e-4


@pytest.mark.e2e
def test_ddp_and_fsdp2_train_as_one_process_does(models, tmp_path):
    cases = [({}, False), ({"micro_batch_patches": 160}, False), ({}, True)]
    cases.append(({"micro_batch_patches": 160}, True))
    (alone,) = train(0, 1, models, str(tmp_path), cases[:1])
    start = start_of(models)
    ranks = run_ranks(train, 2, models, str(tmp_path), cases)
    for number, case in enumerate(cases):
        for rank in ranks:
            assert rank[number]["losses"] == pytest.approx(alone["losses"], rel=1e-5), case
        # Whole parameters come to the first rank.
        assert worst_error(ranks[0][number]["state"], alone["state"], start) < 1e-4, case


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


INPUTS = {**vars(tiny_inputs()), "patches": PatchBudget(4, 16)}


def flexible_inputs():
    return type(tiny_inputs())(**INPUTS)


def test_batches_and_their_lengths_are_the_same_on_any_ranks_and_loaders_and_at_a_resume(shards):
    inputs = flexible_inputs()
    expected, _ = batches_of(0, 1, inputs, shards, 0, 9)
    lengths = [images.shape[1] - 1 for _, images in expected]
    assert set(lengths) == {4, 9, 16}
    # Two loader processes prefetch beyond what is trained on; a checkpoint does not see it.
    for stop, workers in ((2, 2), (4, 0)):  # in the first epoch of three batches, in the second
        first, state = batches_of(0, 1, inputs, shards, workers, stop)
        rest, _ = batches_of(0, 1, inputs, shards, 2 - workers, 9 - stop, state)
        for ours, theirs in zip([*first, *rest], expected, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    ranks = run_ranks(batches_of, 3, inputs, shards, 0, 9)
    for number, (ids, images) in enumerate(expected):
        parts = [found[number] for found, _ in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), ids)
        assert torch.equal(torch.cat([part[1] for part in parts]), images)


def test_other_lengths_are_not_gone_on_with(shards):
    _, state = batches_of(0, 1, flexible_inputs(), shards, 0, 1)
    data = ImageTextDataModule(
        shards, inputs=flexible_inputs(), global_batch_size=12, seed=3, block_shards=2
    )
    data.load_state_dict(state)
    with pytest.raises(UserError, match="sequence_lengths was 4 x 1, 9 x 1, 16 x 1 when") as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


class Spread(Objective):
    """A term over all tokens, padding included."""

    name = "spread"
    needs = frozenset({"image tokens"})

    def forward(self, rows):
        spread = rows.tokens.var(dim=1).mean(dim=1)
        return {"spread": Term(spread.sum(), rows.valid.sum())}


def captioned(models):
    """A NaFlex model with a decoder whose words depend on the patches."""
    torch.manual_seed(1)
    built = build_dual_encoder(*models, num_patches=64)
    built.encoder.eval()
    objectives = build_objectives([Captioning(parallel=0.5)], built)
    torch.nn.init.normal_(objectives["captioning"].output.weight, std=0.3)
    return built, objectives


@torch.no_grad()
def test_captions_are_written_from_patches_and_not_from_padding(models):
    built, objectives = captioned(models)
    captioning = objectives["captioning"]
    batch, longer = (batch_of(num_patches) for num_patches in (64, 100))

    def rows_of_batch(batch, *, is_masked=True):
        mask = patch_mask(batch.images) if is_masked else None
        tokens = built.encoder.encode_image_tokens(batch.images)[1]
        ids = batch.sample_ids
        return Rows(tokens, batch.texts, ids, batch.valid, token_mask=mask)

    _, terms = encode_with_terms(built.encoder, objectives, batch, 0, 6)
    ours, padded = (captioning.measure(rows_of_batch(each)) for each in (batch, longer))
    broken = captioning.measure(rows_of_batch(longer, is_masked=False))
    for name, term in ours.items():
        assert padded[name].total.item() == pytest.approx(term.total.item(), abs=1e-4), name
    name = "caption_loss"
    assert abs(broken[name].total.item() - ours[name].total.item()) > 1e-3
    for micro_batch_size, other in ((2, batch), (6, longer)):
        _, found = encode_with_terms(built.encoder, objectives, other, 0, micro_batch_size)
        expected = terms["captioning"][name]
        total = found["captioning"][name].total.item()
        assert total == pytest.approx(expected.total.item(), abs=1e-4)
    texts = [
        captioning.write(rows.tokens, rows.token_mask)
        for rows in map(rows_of_batch, (batch, longer))
    ]
    assert torch.equal(*texts)
    measures = ObjectiveMeasures()
    for part in (slice(0, 4), slice(4, 6)):
        shown = rows_of(batch, part)
        tokens = built.encoder.encode_image_tokens(shown.images)[1]
        measures.update({"captioning": captioning}, shown, tokens, 6)
    metrics, written = measures.compute({"captioning": captioning}, built)
    assert metrics[name] == pytest.approx(ours[name].total.item() / 6, abs=1e-5)
    is_target = captioning.writing.is_target(texts[0])
    decoded = [
        built.tokenizer.decode(t[keep].tolist())
        for t, keep in zip(texts[0], is_target, strict=True)
    ]
    assert {number: each.caption for number, each in written.items()} == dict(enumerate(decoded))


def refused(act, match):
    with pytest.raises(UserError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_what_does_not_go_with_pictures_of_any_shape_is_refused_in_one_line(models):
    def module(**settings):
        return SigLipModule(models[0], pretrained=models[1], **settings)

    flexible = {"num_patches": 64}
    refused(
        lambda: module(objectives=[Spread()], **flexible), r"\(Spread\) take pictures of one si"
    )
    refused(lambda: module(micro_batch_patches=64), "is of pictures of any shape")
    refused(lambda: module(micro_batch_patches=0, **flexible), "must be at least 1, and at least")
    refused(lambda: module(patch_dropout=0.5, **flexible), "patch_dropout leaves out padding")
    data = ImageTextDataModule("a.tar", inputs=flexible_inputs(), sequence_lengths=[4, 90])
    assert data.lengths == SequenceLengths((4, 90))
    built = module(micro_batch_patches=80, **flexible)
    refused(lambda: built.check_data(data), r"must be at least the longest of data.*\(90\)")
    live = TeacherConfig(model=models[0], pretrained=models[1])
    distilled = {"loss": DistillationLoss(), "teachers": [live]}
    refused(lambda: module(**distilled, **flexible), "would see the patches of the student")
    reinforced = {"datacompdr": DataCompDR(dims=[8], picture_size=16), "train_crop_scale": None}
    settings = {"inputs": flexible_inputs(), **reinforced}
    refused(
        lambda: ImageTextDataModule("a.tar", **settings), "datacompdr replays crops of one size"
    )
    with_lengths = {"inputs": tiny_inputs(), "sequence_lengths": [4]}
    refused(lambda: ImageTextDataModule("a.tar", **with_lengths), "set model.num_patches")
    assert ImageTextDataModule("a.tar", inputs=tiny_inputs()).lengths is None


@pytest.mark.e2e
def test_a_run_from_shards_to_an_export(tmp_path, capsys):
    """Trained at three lengths, stopped and gone on with, evaluated, embedded, exported."""
    settings = write_settings(tmp_path, max_steps=4, val_check_interval=4)
    content = yaml.safe_load(settings.read_text())
    content["model"] |= {
        "model": write_config(tmp_path / "fixed.json", FIXED),
        "num_patches": 36,
        "micro_batch_patches": 192,
    }
    content["data"]["sequence_lengths"] = [16, 36, 64]
    settings.write_text(yaml.safe_dump(content))
    train_run(["fit", "--config", str(settings)]).let_go()
    run = tmp_path / "run"
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert metrics["available_pairs"] == 20
    more = ["--trainer.max_steps", "6", "--model.optim.accept_rate_jump", "true"]
    train_run(["fit", "--config", str(settings), *more]).let_go()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 6
    shapes = [
        (line["train/patches"], line["train/padding"]) for line in lines if "train/patches" in line
    ]
    assert {length for length, _ in shapes} <= {16, 36, 64}
    assert all(0 <= padding < 0.5 for _, padding in shapes)
    page = (run / "report.html").read_text()
    assert "Shapes of pictures" in page
    assert f"{int(shapes[0][0])} patches" in page
    built = load_trained(run_dir=str(run))
    assert built.patches == (8, 36)
    rows = []
    for length in (None, 36, 100):
        out = tmp_path / f"embedded-{length}"
        asked = [] if length is None else ["--num_patches", str(length)]
        shards = [*content["data"]["val_shards"], "--run_dir", str(run)]
        options = ["--out", str(out), "--dtype", "float32", "--workers", "0", "--device", "cpu"]
        assert main(["embed", *shards, *options, *asked]) == 0
        files = sorted((out / "img_emb").glob("*.npy"))
        rows.append(np.concatenate([np.load(file) for file in files]))
    assert np.array_equal(rows[0], rows[1])
    assert np.abs(rows[0] - rows[2]).max() > 1e-4
    out = ["--out", str(tmp_path / "out"), "--num_patches", "50"]
    assert main(["export", "--to", "safetensors", "--run_dir", str(run), *out]) == 0
    again = load_trained(model=f"local-dir:{tmp_path / 'out'}")
    assert again.patches == (8, 50)
    packed = packed_of()
    with torch.no_grad():
        found = again.encoder.encode_image(packed)
        assert torch.equal(found, built.encoder.encode_image(packed))
    capsys.readouterr()
    content["data"]["sequence_lengths"] = [16, 300]
    settings.write_text(yaml.safe_dump(content))
    refused(lambda: train_run(["fit", "--config", str(settings)]), r"micro_batch_patches \(192\)")


def test_shared_memory_is_reckoned_with_the_longest_pictures_and_budgets_are_free_to_change(models):
    asked = SimpleNamespace(model=models[0], image_size=None, num_patches=64)
    assert _picture_size(asked, None) == (8, 8 * 1024)
    assert _picture_size(asked, [16, 40]) == (8, 8 * 40)
    asked.num_patches = None
    assert _picture_size(asked, None) == (64, 64)
    settings = {"model": {"micro_batch_patches": 1024, "num_patches": 64}}
    changed = {"model": {"micro_batch_patches": None, "num_patches": 64}}
    assert describe_differences(settings, changed) == []
    changed = {"model": {"micro_batch_patches": 1024, "num_patches": None}}
    assert len(describe_differences(settings, changed)) == 1


def test_packed_pictures_of_the_tests_have_padding_and_several_shapes():
    packed = packed_of()
    assert unpack(packed)[1].tolist() == [list(grid) for grid in GRIDS]
    assert patch_mask(packed).sum(dim=1).tolist() == [64, 64, 64, 45, 56, 40]
    logged = padding_of(packed)
    assert logged["patches"].item() == packed.shape[1] - 1
    assert logged["padding"].item() == pytest.approx(1 - patch_mask(packed).double().mean().item())
    assert padding_of(torch.zeros(2, 3, 8, 8)) == {}
