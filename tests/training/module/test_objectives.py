"""Objectives in a training step: one pass of each tower, and the mean over the global batch."""

import json
import math
import shutil
from functools import lru_cache

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from dist_siglip.cli import main
from dist_siglip.cli.run.start_point import check_fits
from dist_siglip.cli.run.training import train as train_run
from dist_siglip.data.handwriting import number_in_words, write_handwriting_shards
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.models import build_dual_encoder, compile_towers
from dist_siglip.models.tuning import TowerConfig
from dist_siglip.objectives import Captioning, Rows
from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks import AtomicCheckpointIO, WeightAverage
from dist_siglip.training.module import SigLipModule, load_trained, siglip
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.objective_measures import ObjectiveMeasures, regions_of
from dist_siglip.training.module.objectives import (
    build_objectives,
    refuse_cached,
)
from dist_siglip.training.optim import OptimConfig
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.command import write_settings
from tests.support.objective_ranks import (
    LAYOUTS,
    MICRO_BATCH_SIZES,
    TASKS,
    batch_of,
    evaluated,
    gradients_of,
    rows_of,
    weighed,
)
from tests.support.processes import run_ranks
from tests.support.schedule_free import ScheduleFreeSGD
from tests.support.sharded_ranks import worst_error
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import CALM, fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


CASES = [*((size, "") for size in MICRO_BATCH_SIZES), (2, "regions")]
WHOLE = [(None, "regions")]
BROKEN = [(None, "mean of this rank")]
SHARDED = [(None, "regions shards")]


@lru_cache
def results_of(world_size, model):
    if world_size == 1:
        cases = CASES + WHOLE
        return [dict(zip(cases, gradients_of(0, 1, model, cases), strict=True))]
    cases = CASES + BROKEN + SHARDED
    found = run_ranks(gradients_of, world_size, model, cases)
    return [dict(zip(cases, each, strict=True)) for each in found]


def worst(found, expected):
    return max(
        ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
        if value.abs().max() > 0
    )


@pytest.mark.parametrize("kind", ["", "regions"])
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process_at_any_micro_batch(world_size, kind, model):
    """With regions on some ranks alone, too."""
    expected = results_of(1, model)[0][None, kind]
    assert "objectives.captioning.output.weight" in expected
    assert expected["logged"].all()
    assert len(expected["logged"]) == (3 if kind else 1)
    for cases in results_of(world_size, model):
        for case in CASES:
            if case[1] == kind:
                assert cases[case].keys() == expected.keys()
                assert worst(cases[case], expected) < 1e-10


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_on_ranks_with_uneven_batches_give_those_of_one_process(world_size, case, model):
    expected = results_of(1, model)[0][None, "regions"]
    for cases in results_of(world_size, model):
        assert cases[case].keys() == expected.keys()
        assert worst(cases[case], expected) < 1e-10


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_comparison_rejects_the_mean_of_each_rank(world_size, model):
    expected = {**results_of(1, model)[0][None, ""], "logged": torch.zeros(())}
    assert worst(results_of(world_size, model)[0][BROKEN[0]], expected) > 1e-3


def test_of_a_term_gradients_reach_image_tower_and_decoder_alone(model):
    torch.manual_seed(1)
    built = build_dual_encoder(model)
    towers = built.encoder
    objective = Captioning()
    objectives = build_objectives([objective], built)
    torch.nn.init.normal_(objective.output.weight, std=0.3)
    batch = batch_of(dtype=torch.float32)
    _, terms = encode_with_terms(towers, objectives, batch, 0, 6)
    terms["captioning"]["caption_loss"].total.backward()
    reached = {
        name.split(".")[1]
        for name, parameter in towers.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == {"visual"}
    assert all(parameter.grad.any() for parameter in objective.parameters())


class Gradients(Callback):
    """Keeps those of the first step, in which an output matrix of zeros would give none."""

    def on_train_start(self, trainer, pl_module):
        for objective in pl_module.objectives.values():
            torch.nn.init.normal_(objective.output.weight, std=0.3)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: value.grad.clone() for name, value in pl_module.named_parameters()}


def test_a_step_without_objectives_is_that_of_towers_and_loss_to_the_bit(model, tmp_path):
    """And beside one the gradients of text tower, scale and bias are still those."""
    batch = batch_of(4, 0, torch.float32)
    plain = locked_module(model)
    features = plain.towers(batch.images, batch.texts)
    siglip_loss(*features, *plain.logits()).backward()
    expected = {name: value.grad for name, value in plain.named_parameters()}
    for objectives in (None, [], [Captioning(0.7)]):
        keep = Gradients()
        settings = {"gradient_clip_val": None, "callbacks": [keep]}
        train(model, tmp_path, 1, objectives=objectives, trainer=settings)
        moved = {
            name.split(".")[2]
            for name, value in expected.items()
            if not torch.equal(keep.found[name], value)
        }
        assert moved == ({"visual"} if objectives else set())


def test_the_shares_of_the_published_case():
    found = run_ranks(weighed, 2)
    shares = [share for share, _ in found]
    assert shares == pytest.approx([0.433769, 0.907668], abs=1e-6)
    assert sum(shares) / 2 == pytest.approx(0.670718, abs=1e-6)
    assert [mean for _, mean in found] == pytest.approx([0.670718] * 2, abs=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "clip", "custom_text"])
def test_features_beside_tokens_are_those_without_to_the_last_bit(kind, tmp_path):
    torch.manual_seed(1)
    towers = build_dual_encoder(write_config(tmp_path / "m.json", ARCHITECTURES[kind])).encoder
    images = torch.randn(3, 3, 32, 32)
    for mode in (True, False):
        towers.train(mode)
        features, tokens = towers.encode_image_tokens(images)
        assert torch.equal(features, towers.encode_image(images))
    visual = towers.clip.visual
    assert tokens.shape == ((3, 4, 64) if kind == "siglip" else (3, 16, 16))
    if kind == "siglip":
        (whole,) = visual.trunk.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
        )
    else:
        (whole,) = visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )["image_intermediates"]
    assert torch.equal(tokens, whole)


def test_tokens_of_a_tower_that_pools_before_its_norm_are_normed(tmp_path):
    architecture = {**ARCHITECTURES["clip"]}
    architecture["vision_cfg"] = {**architecture["vision_cfg"], "final_ln_after_pool": True}
    towers = build_dual_encoder(write_config(tmp_path / "m.json", architecture)).encoder.eval()
    features, tokens = towers.encode_image_tokens(torch.randn(2, 3, 32, 32))
    assert tokens.mean(dim=-1).abs().max() < 1e-5
    assert features.shape == (2, 8)


def test_towers_without_tokens_are_refused_in_one_line(tmp_path):
    pooled = {**ARCHITECTURES["clip"]}
    pooled["vision_cfg"] = {
        **pooled["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    }
    for number, architecture in enumerate((ARCHITECTURES["resnet"], pooled)):
        path = write_config(tmp_path / f"{number}.json", architecture)
        with pytest.raises(UserError, match="gives no patch tokens") as caught:
            SigLipModule(path, objectives=[Captioning()])
        assert "\n" not in str(caught.value)


class Watch(Callback):
    """Counts passes through the towers, and keeps what is logged of each step."""

    def __init__(self):
        self.passes, self.logged, self.decoded = [], [], 0

    def on_train_start(self, trainer, pl_module):
        clip = pl_module.towers.clip
        for name, block in (
            ("image", clip.visual.trunk.blocks[0]),
            ("text", clip.text.transformer.resblocks[0]),
        ):
            block.register_forward_hook(lambda *_, name=name: self.passes.append(name))
        for objective in pl_module.objectives.values():
            objective.decoder.register_forward_hook(self._count_decoded)

    def _count_decoded(self, *_):
        self.decoded += 1

    def on_train_batch_end(self, trainer, *_):
        kept = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.logged.append({**kept, "passes": list(self.passes), "decoded": self.decoded})
        self.passes.clear()


def train(model, folder, num_steps=3, start=None, objectives=None, done=0, **settings):
    """A run on batches with captions of several lengths; its module, trainer and log."""
    trainer_settings = settings.pop("trainer", {})
    module = locked_module(model, objectives=objectives, **settings)
    watch = Watch()
    batches = [batch_of(4, seed, torch.float32) for seed in range(num_steps + 8)][done:]
    trainer = fit(
        module,
        folder,
        batches,
        ckpt_path=start,
        callbacks=[watch, *trainer_settings.pop("callbacks", [])],
        **{"max_steps": num_steps, "gradient_clip_val": 1.0, **trainer_settings},
    )
    return module, trainer, watch.logged


def towers_of(module):
    return {
        name: value.clone()
        for name, value in module.state_dict().items()
        if not name.startswith("objectives.")
    }


def all_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_one_pass_of_each_tower_serves_loss_and_objective(model, tmp_path, micro_batch_size):
    size = {"micro_batch_size": micro_batch_size}
    alone = train(model, tmp_path, 1, **size)[2]
    passes = 1 if micro_batch_size is None else 4
    for tasks in (("caption",), TASKS):
        logged = train(model, tmp_path, 1, objectives=[Captioning(tasks=tasks)], **size)[2]
        assert sorted(logged[0]["passes"]) == sorted(alone[0]["passes"])
        assert logged[0]["passes"].count("image") == passes
        assert logged[0]["decoded"] == passes  # all tasks in one
    later = train(model, tmp_path, 3, objectives=[Captioning(start=1)], **size)[2]
    assert [sorted(entry["passes"]) for entry in later] == [sorted(alone[0]["passes"])] * 3


def test_an_objective_of_weight_0_and_one_that_has_not_begun_change_nothing(model, tmp_path):
    expected = towers_of(train(model, tmp_path)[0])
    for objective in (Captioning(0.0), Captioning(start=3)):
        torch.manual_seed(9)
        module, _, logged = train(
            model,
            tmp_path,
            objectives=[objective],
            optim=CALM,
        )
        assert all_equal(towers_of(module), expected)
        fresh = locked_module(model, objectives=[type(objective)()])
        # Heads stay as they were built: no decay, no step.
        assert all_equal(dict(module.objectives.state_dict()), dict(fresh.objectives.state_dict()))
        assert logged[-1]["train/captioning_weight"] == 0
    module, _, logged = train(model, tmp_path, objectives=[Captioning(start=2)])
    assert [entry["train/captioning_weight"] for entry in logged] == [0, 0, 1]
    assert not all_equal(towers_of(module), expected)


def test_terms_weights_and_the_pairwise_loss_are_logged(model, tmp_path):
    _, _, logged = train(model, tmp_path, objectives=[Captioning(0.5, ramp_steps=2)])
    for entry, weight in zip(logged, (0.25, 0.5, 0.5), strict=True):
        assert entry["train/captioning_weight"] == weight
        whole = entry["train/pair_loss"] + weight * entry["train/caption_loss"]
        assert entry["train/loss"] == pytest.approx(whole, rel=1e-5)
    assert logged[0]["train/caption_loss"] == pytest.approx(10.80787, abs=1e-4)


# Of the blocks of towers and heads, and, beside it, one with weights of its own to evaluate.
MUON = OptimConfig(
    learning_rate=0.01,
    weight_decay=0.0,
    schedule="constant",
    optimizer=torch.optim.Muon,
    fallback_optimizer=ScheduleFreeSGD,
)


@pytest.mark.parametrize("optim", [CALM, MUON], ids=["AdamW", "Muon beside a schedule-free one"])
def test_a_run_that_is_stopped_goes_on_to_the_bit_across_the_beginning_of_an_objective(
    model, tmp_path, optim
):
    objective = {"start": 2, "parallel": 0.5, "tasks": TASKS}
    settings = {"optim": optim}
    whole, _, logged = train(model, tmp_path, 4, objectives=[Captioning(**objective)], **settings)
    for stop in (1, 3):
        path = tmp_path / f"{stop}.ckpt"
        settings["objectives"] = [Captioning(**objective)]
        _, trainer, _ = train(model, tmp_path, stop, **settings)
        trainer.save_checkpoint(path)
        settings["objectives"] = [Captioning(**objective)]
        module, _, rest = train(model, tmp_path, 4, start=path, done=stop, **settings)
        assert all_equal(dict(module.state_dict()), dict(whole.state_dict()))
        assert rest[-1]["train/loss"] == logged[-1]["train/loss"]


def test_under_autocast_terms_are_float32_and_near_those_without(model, tmp_path):
    exact = train(model, tmp_path, objectives=[Captioning(tasks=TASKS)])[2]
    settings = {"precision": "bf16-mixed"}
    rounded = train(model, tmp_path, objectives=[Captioning(tasks=TASKS)], trainer=settings)[2]
    for ours, theirs in zip(rounded, exact, strict=True):
        for name in (f"train/{task}_loss" for task in TASKS):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01)
    assert rounded[-1]["train/caption_loss"] != exact[-1]["train/caption_loss"]


@pytest.mark.e2e
@pytest.mark.parametrize("tasks", [("caption",), TASKS])
def test_compiled_parts_give_what_eager_ones_give(model, tasks):
    torch.manual_seed(1)
    built = build_dual_encoder(model)
    batch, images = batch_of(2), torch.randn(2, 3, 32, 32)
    features, tokens = built.encoder.encode_image_tokens(images)
    objective = build_objectives([Captioning(layers=1, tasks=tasks)], built)["captioning"]
    torch.nn.init.normal_(objective.output.weight, std=0.3)
    rows = Rows(tokens, batch.texts, batch.draws, batch.valid, regions_of(batch))
    expected = objective(rows)
    compile_towers(built.encoder, backend="aot_eager")
    objective.compile_heads("aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = built.encoder.encode_image_tokens(images)
    assert torch.allclose(found[0], features, atol=1e-5)
    assert torch.allclose(found[1], tokens, atol=1e-5)
    for name, term in objective(rows).items():
        assert term.total.item() == pytest.approx(expected[name].total.item(), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.e2e
def test_a_compiled_run_takes_the_steps_of_an_eager_one_with_as_many_graphs_as_parts(
    model, tmp_path, monkeypatch
):
    """The towers; from where it begins the decoder, and the image tower with its tokens."""
    settings = {"objectives": [Captioning(layers=1, start=1, parallel=0.5)], "optim": CALM}
    eager, _, expected = train(model, tmp_path, 4, **settings)
    own, translate = Captioning.compile_heads, siglip.translate_towers
    monkeypatch.setattr(Captioning, "compile_heads", lambda self, _: own(self, "aot_eager"))
    monkeypatch.setattr(
        siglip, "translate_towers", lambda towers: translate(towers, backend="aot_eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    settings["objectives"] = [Captioning(layers=1, start=1, parallel=0.5)]
    trainer = {"callbacks": [graphs]}
    compiled, _, found = train(model, tmp_path, 4, compile_towers=True, trainer=trainer, **settings)
    assert graphs.counts == [2, 4, 4, 4]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("train/loss", "train/pair_loss", "train/caption_loss"):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5), name
    start = locked_module(model, objectives=[Captioning(layers=1)], optim=CALM).state_dict()
    assert worst_error(compiled.state_dict(), eager.state_dict(), start) < 1e-3


class Graphs(Callback):
    """Counts, after each step, the graphs that were translated so far."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, *_):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_an_evaluation_measures_captions_and_writes_those_of_its_pictures(model):
    module = locked_module(model, objectives=[Captioning(layers=1, tasks=TASKS)])
    batch = batch_of(6, dtype=torch.float32)
    batch = batch._replace(valid=torch.tensor([True] * 5 + [False]))
    measures = ObjectiveMeasures()
    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 6)):
            part = rows_of(batch, rows)
            _, tokens = module.towers.encode_image_tokens(part.images)
            measures.update(module._measured, part, tokens, 5)
        metrics, written = measures.compute(module._measured, module.built)
    assert metrics["caption_loss"] == pytest.approx(math.log(49408 + 500), abs=1e-4)
    assert metrics["caption_token_accuracy"] == 0
    assert metrics["caption_picture_gain"] == pytest.approx(0, abs=1e-5)
    assert metrics["referring_loss"] == pytest.approx(math.log(49408 + 500), abs=1e-4)
    assert metrics["box_exact"] == metrics["box_iou_50"] == 0
    assert sorted(written) == [0, 1, 2, 3, 4]  # all valid ones, of which there are few
    assert all(isinstance(each.caption, str) for each in written.values())
    assert [number for number, each in written.items() if each.region] == [0, 1, 2]
    texts = batch.region_texts[1]
    assert written[1].region.text == module.built.tokenizer.decode(
        texts[1 : texts.argmax()].tolist()
    )
    assert written[1].region.box == pytest.approx(batch.region_boxes[1].tolist())
    assert written[1].region.written == pytest.approx((0.001,) * 4)


MEASURED = [f"val/{task}_{kind}" for task in TASKS for kind in ("loss", "token_accuracy")]
MEASURED += ["val/box_exact", "val/box_iou_50"]


@pytest.mark.e2e
def test_ranks_and_shards_measure_and_write_what_one_process_does(model, tmp_path):
    ((alone, written),) = evaluated(0, 1, model, str(tmp_path), [None])
    assert sorted(written) == list(range(7))
    assert any(each.caption for each in written.values())
    assert sum(each.region is not None for each in written.values()) == 4
    for results in run_ranks(evaluated, 2, model, str(tmp_path), [None, {}]):
        for metrics, captions in results:
            assert captions == written
            for name in (*MEASURED, "val/loss"):
                assert metrics[name] == pytest.approx(alone[name], rel=1e-4), name


def test_heads_are_no_part_of_towers_and_weights_of_a_run_load_without_them(model, tmp_path):
    module, trainer, _ = train(model, tmp_path, 1, objectives=[Captioning()])
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    assert any(name.startswith("objectives.captioning") for name in module.state_dict())
    assert not any("objectives" in name for name in module.towers.state_dict())
    alone = SigLipModule(model, pretrained=str(path))
    assert all_equal(dict(alone.towers.state_dict()), dict(module.towers.state_dict()))


def test_a_checkpoint_with_other_objectives_is_refused_in_one_line(model, tmp_path):
    paths = {}
    for name, objectives in (("none", None), ("captioning", [Captioning(layers=1)])):
        paths[name] = tmp_path / f"{name}.ckpt"
        _, trainer, _ = train(model, tmp_path, 1, objectives=objectives)
        trainer.save_checkpoint(paths[name])
    for start, objectives in (("captioning", None), ("none", [Captioning(layers=1)])):
        with pytest.raises(UserError, match=rf"objectives \({start}\), and .* model.pretr") as e:
            train(model, tmp_path, 2, objectives=objectives, start=paths[start], done=1)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match=rf"objectives \({start}\), and"):
            check_fits(locked_module(model, objectives=objectives), paths[start])
    for found in run_ranks(_starts_from, 2, model, str(tmp_path), paths["captioning"]):
        assert all("has heads of objectives (captioning), and" in text for text in found)
        assert len(found) == 2


def _starts_from(rank, world_size, model, folder, path):
    """What sharded runs without objectives say to a file and to a folder that have some."""
    said = []
    batches = [batch_of(2, seed, torch.float32) for seed in range(8)]
    common = {"rank": rank, "world_size": world_size, "max_steps": 1}
    module = locked_module(model, objectives=[Captioning(layers=1)])
    strategy = FullyShardedStrategy(checkpoint="sharded")
    trainer = fit(module, folder, batches, strategy=strategy, **common)
    trainer.save_checkpoint(f"{folder}/shards.ckpt")
    for start in (path, f"{folder}/shards.ckpt"):
        strategy = FullyShardedStrategy()
        try:
            fit(locked_module(model), folder, batches, ckpt_path=start, strategy=strategy, **common)
        except UserError as error:
            said.append(str(error))
    return said


def test_an_average_takes_in_heads_and_a_run_goes_on_with_it_to_the_bit(model, tmp_path):
    """Stopped before and after the objective begins."""
    name = "objectives.captioning.output.weight"

    def run(num_steps, path, start=None, done=0):
        objectives = [Captioning(layers=1, start=2)]
        keep = AtEnd(path, name)
        settings = {"callbacks": [WeightAverage(decay=0.6), keep]}
        module, *_ = train(
            model,
            tmp_path,
            num_steps,
            start,
            objectives,
            done,
            trainer=settings,
        )
        return module, keep

    module, whole = run(5, tmp_path / "whole.ckpt")
    assert not any(value.any() for value in whole.values[:2])
    average = whole.values[0]
    for value in whole.values[1:]:
        average = 0.6 * average + 0.4 * value
    assert torch.allclose(whole.saved["state_dict"][name], average, atol=1e-7)
    assert torch.equal(module.get_parameter(name), whole.saved["state_dict"][name])
    assert torch.equal(whole.saved["current_model_state"][name], whole.values[-1])
    for stop in (1, 3):
        run(stop, tmp_path / "part.ckpt")
        _, rest = run(5, tmp_path / "rest.ckpt", str(tmp_path / "part.ckpt"), stop)
        for state in ("state_dict", "current_model_state"):
            assert all_equal(rest.saved[state], whole.saved[state])
    # Towers of the average are those of a file without heads.
    alone = SigLipModule(model, pretrained=str(tmp_path / "whole.ckpt"))
    assert all_equal(dict(alone.towers.state_dict()), dict(module.towers.state_dict()))


class AtEnd(Callback):
    """Keeps a parameter after each step, and the checkpoint at the end."""

    def __init__(self, path, name):
        self.path, self.name, self.values = path, name, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.values.append(pl_module.get_parameter(self.name).detach().clone())

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
        self.saved = torch.load(self.path, weights_only=True)


def test_heads_are_built_without_values_as_with_them(model):
    """As on ranks that get theirs from the first one."""
    with torch.device("meta"):
        empty = locked_module(model, objectives=[Captioning()])
    whole = locked_module(model, objectives=[Captioning()])
    assert all(value.is_meta for value in empty.parameters())
    shapes = [
        {name: value.shape for name, value in each.state_dict().items()} for each in (empty, whole)
    ]
    assert shapes[0] == shapes[1]
    assert empty.by_name["captioning"].writing == whole.by_name["captioning"].writing


def test_what_makes_no_sense_is_refused_in_one_line(model):
    class Cached:
        class features:  # noqa: N801 - stands in for an attribute
            towers = ("image",)

    for settings, words in (
        ({"objectives": [Captioning(), Captioning()]}, "objectives name Captioning twice"),
        (
            {"objectives": [Captioning()], "image_tower": TowerConfig(locked=True)},
            "objectives train the image tower, which is locked whole",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            locked_module(model, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="need image tokens, and train_features stand"):
        refuse_cached(Cached, [Captioning()])
    Cached.features.towers = ("text",)
    with pytest.raises(UserError, match="need captions"):
        refuse_cached(Cached, [Captioning()])


def test_with_a_locked_text_tower_image_tower_and_decoder_train(model, tmp_path):
    locked = {"text_tower": TowerConfig(locked=True)}
    module, _, logged = train(model, tmp_path, 3, objectives=[Captioning()], **locked)
    start = locked_module(model, objectives=[Captioning()], **locked).state_dict()
    moved = {
        ".".join(name.split(".")[:3])
        for name, value in module.state_dict().items()
        if not torch.equal(value, start[name])
    }
    assert "towers.clip.text" not in moved
    assert moved > {"towers.clip.visual", "objectives.captioning.decoder"}
    assert logged[-1]["train/caption_loss"] < logged[0]["train/caption_loss"]


@pytest.mark.e2e
def test_fit_with_an_objective_logs_it_writes_captions_and_goes_on(tmp_path):
    settings = write_settings(tmp_path, max_steps=6, val_check_interval=3)
    content = yaml.safe_load(settings.read_text())
    arguments = {"weight": 0.5, "start": 0.25, "parallel": 0.5}
    content["model"]["objectives"] = [
        {"class_path": "dist_siglip.objectives.Captioning", "init_args": arguments}
    ]
    settings.write_text(yaml.safe_dump(content))
    run_dir = tmp_path / "run"
    train_run(["fit", "--config", str(settings)]).let_go()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = {
        line["step"]: line["train/captioning_weight"]
        for line in lines
        if "train/captioning_weight" in line
    }
    assert weights == {1: 0.0, 2: 0.0, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}
    metrics = json.loads((run_dir / "evaluation/metrics.json").read_text())
    assert 0 < metrics["caption_loss"] < 10.9
    assert {"caption_token_accuracy", "caption_picture_gain"} < metrics.keys()
    examples = json.loads((run_dir / "evaluation/examples.json").read_text())
    assert len(examples["images"]) == 20
    assert all(isinstance(image["written"], str) for image in examples["images"])
    report = (run_dir / "report.html").read_text()
    assert "the decoder writes" in report
    assert '<section id="objectives">' in report
    # A command that uses the model sees the towers alone.
    assert not hasattr(load_trained(run_dir=str(run_dir)).encoder, "objectives")
    made = made_of(run_dir, content["data"]["val_shards"], tmp_path / "with")
    leave_heads_out(run_dir)
    assert made_of(run_dir, content["data"]["val_shards"], tmp_path / "without") == made
    shutil.copy(tmp_path / "whole.ckpt", RunFolder(run_dir).newest_checkpoint())
    longer = ["--trainer.max_steps", "8", "--model.optim.accept_rate_jump", "true"]
    train_run(["fit", "--config", str(settings), *longer]).let_go()
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    arguments["parallel"] = 2.0
    settings.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"init_args.parallel \(2.0\) must be in \[0, 1\]"):
        train_run(["fit", "--config", str(settings)])


def made_of(run_dir, shards, out):
    """Bytes of all files that an export of a run and its embeddings consist of."""
    assert main(["export", f"--run_dir={run_dir}", "--to=open_clip", f"--out={out}/export"]) == 0
    words = [f"--run_dir={run_dir}", json.dumps(shards), f"--out={out}/rows"]
    assert main(["embed", *words, "--workers=0"]) == 0
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def leave_heads_out(run_dir):
    """Write the newest checkpoint of a run anew, without any tensor of an objective."""
    path = RunFolder(run_dir).newest_checkpoint()
    shutil.copy(path, run_dir.parent / "whole.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    names = [name for name in checkpoint["state_dict"] if name.startswith("objectives.")]
    assert names
    for name in names:
        del checkpoint["state_dict"][name]
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


@pytest.mark.e2e
def test_fit_with_regions_writes_boxes_and_is_refused_without(tmp_path):
    settings = write_settings(tmp_path, max_steps=2, val_check_interval=2)
    content = yaml.safe_load(settings.read_text())
    shards = write_handwriting_shards(
        tmp_path / "regions",
        num_train_pairs=72,
        num_val_pairs=20,
        num_train_shards=3,
        image_size=48,
        regions=True,
    )
    content["data"] |= {"train_shards": shards.train, "val_shards": shards.val}
    content["model"]["objectives"] = [
        {
            "class_path": "dist_siglip.objectives.Captioning",
            "init_args": {"tasks": list(TASKS), "box_bins": 16},
        }
    ]
    settings.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="need regions of pictures; name their field") as caught:
        train_run(["fit", "--config", str(settings)])
    assert "\n" not in str(caught.value)
    train_run(["fit", "--config", str(settings), "--data.regions.json_field", "regions"]).let_go()
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert 0 < metrics["referring_loss"] < 10.9
    assert {"box_exact", "box_iou_50", "grounded_token_accuracy"} < metrics.keys()
    examples = json.loads((tmp_path / "run/evaluation/examples.json").read_text())
    sought = [image["sought"] for image in examples["images"] if "sought" in image]
    assert len(sought) > 10
    assert {*sought} <= {"zero", *(number_in_words(digit, 1) for digit in range(1, 10))}
    assert "in orange where the decoder" in (tmp_path / "run/report.html").read_text()
