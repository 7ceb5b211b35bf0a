"""Self-distillation and masked prediction in a training step, and the teacher they learn of."""

import copy
import json
from functools import lru_cache

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from dist_siglip.cli.run.training import train as train_run
from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder, compile_towers
from dist_siglip.models.tuning import TowerConfig
from dist_siglip.objectives import Captioning, MaskedPrediction, SelfDistillation
from dist_siglip.training.callbacks import SkipBadSteps, WeightAverage
from dist_siglip.training.module import SigLipModule, load_trained
from dist_siglip.training.module.ema_teacher import EmaTeacher
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.objectives import (
    build_objectives,
    draws_of,
    refuse_cached,
)
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.command import write_settings
from tests.support.objective_ranks import LAYOUTS, batch_of, rows_of
from tests.support.processes import run_ranks
from tests.support.self_distillation_ranks import (
    SIZES,
    TEMPERATURES,
    objectives_of,
    steps_of,
    views_of,
)
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
NAMES = ("self_distillation", "masked_prediction")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


# Shards need as many micro-batches on every rank, which uneven ranks do not have.
CASES = [(None, ""), (2, ""), (None, "sinkhorn"), (None, "shards")]
BROKEN = (None, "mean of this rank")


@lru_cache
def results_of(world_size, model):
    if world_size == 1:
        cases = [case for case in CASES if "shards" not in case[1]]
        return [dict(zip(cases, steps_of(0, 1, model, cases), strict=True))]
    found = run_ranks(steps_of, world_size, model, [*CASES, BROKEN])
    return [dict(zip([*CASES, BROKEN], each, strict=True)) for each in found]


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
        if value.is_floating_point() and value.abs().max() > 0
    )


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_loss_gradients_gauges_centres_and_teacher_are_those_of_one_process(world_size, model):
    """On uneven ranks, at any micro-batch, whole and in shards, centred and balanced."""
    alone = results_of(1, model)[0]
    for case in alone[None, ""]:
        assert alone[None, ""][case].isfinite().all(), case
    for cases in results_of(world_size, model):
        for case, found in cases.items():
            if case != BROKEN:
                kind = "sinkhorn" if "sinkhorn" in case[1] else ""
                # Positions of small views are resampled in float32.
                assert worst(found, alone[None, kind]) < 1e-8, case
    assert worst(alone[None, "sinkhorn"], alone[None, ""]) > 1e-3


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_comparison_rejects_the_centre_of_each_rank(world_size, model):
    expected = results_of(1, model)[0][None, ""]
    assert worst(results_of(world_size, model)[0][BROKEN], expected) > 1e-3


def test_every_part_has_a_gradient_and_no_other(model):
    """Heads, mask token and image tower; never the text tower, and nothing of the teacher."""
    found = results_of(1, model)[0][None, ""]
    assert found["objectives.masked_prediction.mask_token"].any()
    for name in NAMES:
        assert found[f"objectives.{name}.head.directions"].any()
    torch.manual_seed(1)
    built = build_dual_encoder(model)
    objectives = build_objectives(objectives_of(), built)
    by_name = dict(objectives.items())
    teacher = EmaTeacher(built.encoder, by_name, 0.9)
    batch = views_of(batch_of(dtype=torch.float32))
    targets = teacher.targets(
        built.encoder, by_name, batch.views, draws_of(batch, 0), 6, TEMPERATURES
    )
    _, terms = encode_with_terms(built.encoder, objectives, batch, 0, 6, targets=targets)
    sum(term.total for each in terms.values() for term in each.values()).backward()
    reached = {
        name.split(".")[1]
        for name, parameter in built.encoder.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == {"visual"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.any() for parameter in objectives.parameters())


class Watch(Callback):
    """Keeps what is logged of each step, and counts passes of the student and of the teacher."""

    def __init__(self):
        self.logged, self.passes, self.states = [], [], []

    def on_train_start(self, trainer, module):
        for name, visual in (
            ("student", module.towers.clip.visual),
            ("teacher", module.teacher.visual),
        ):
            block = visual.trunk.blocks[0]
            block.register_forward_hook(
                lambda _, args, __, name=name: self.passes.append((name, tuple(args[0].shape[:2])))
            )

    def on_train_batch_end(self, trainer, module, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.states.append(copy.deepcopy(dict(module.state_dict())))


def train(model, folder, num_steps=3, start=None, objectives=None, done=0, **settings):
    """A run on batches with views; its module, trainer and what was watched."""
    trainer_settings = settings.pop("trainer", {})
    asked = objectives_of() if objectives is None else objectives
    module = locked_module(model, objectives=asked, **settings)
    watch = Watch()
    batches = [views_of(batch_of(4, seed, torch.float32), seed) for seed in range(num_steps + 8)][
        done:
    ]
    trainer = fit(
        module,
        folder,
        batches,
        ckpt_path=start,
        callbacks=[*trainer_settings.pop("callbacks", []), watch],
        **{"max_steps": num_steps, "gradient_clip_val": 1.0, **trainer_settings},
    )
    return module, trainer, watch


def teacher_of(state):
    return {name: value for name, value in state.items() if name.startswith("teacher.")}


def all_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_the_teacher_is_the_average_of_the_student_after_each_step_from_its_beginning(
    model, tmp_path
):
    begun = objectives_of(start=1)
    module, _, watch = train(model, tmp_path, 4, objectives=begun, teacher_momentum=0.75)
    pairs = [
        (f"teacher.visual.{name}", f"towers.clip.visual.{name}")
        for name, _ in module.teacher.visual.named_parameters()
    ]
    pairs += [
        (f"teacher.heads.{part}.{name}", f"objectives.{part}.head.{name}")
        for part in NAMES
        for name, _ in module.by_name[part].head.named_parameters()
    ]
    states = watch.states
    assert not states[0]["teacher.has_begun"]
    expected = {ours: states[0][theirs] for ours, theirs in pairs}  # set to the student
    for state in states[1:]:
        for ours, theirs in pairs:
            expected[ours] = 0.75 * expected[ours] + 0.25 * state[theirs]
            assert torch.allclose(state[ours], expected[ours], atol=1e-6), ours
    assert states[-1]["teacher.has_begun"]
    assert not torch.equal(states[1]["teacher.centres.self_distillation"], torch.zeros(12))
    optimized = {id(each) for group in _groups(module) for each in group["params"]}
    assert not optimized & {id(each) for each in module.teacher.parameters()}
    assert not any(each.training for each in module.teacher.modules())


def _groups(module):
    return module.trainer.optimizers[0].param_groups


def test_a_step_has_one_pass_of_each_kind_and_the_gauges_of_the_teacher(model, tmp_path):
    """Pictures, small views in one pass, the view with hidden patches; the teacher sees it once."""
    _, _, watch = train(model, tmp_path, 1)
    assert sorted(watch.passes) == [
        ("student", (4, 5)),  # with the class token
        ("student", (4, 5)),
        ("student", (8, 2)),
        ("teacher", (4, 5)),
    ]
    logged = watch.logged[0]
    for name in NAMES:
        loss, kl = logged[f"train/{name}_loss"], logged[f"train/{name}_kl"]
        share = logged[f"train/{name}_entropy"]
        assert loss - kl == pytest.approx(share * torch.tensor(12.0).log().item(), rel=1e-4)
        assert 0 <= share <= logged[f"train/{name}_mean_entropy"] + 1e-6 <= 1 + 1e-5
        assert logged[f"train/{name}_centre_norm"] == 0  # used from the next step on
    whole = sum(logged[f"train/{name}_weight"] * logged[f"train/{name}_loss"] for name in NAMES)
    assert logged["train/loss"] == pytest.approx(logged["train/pair_loss"] + whole, rel=1e-5)


class Spoil(Callback):
    """Makes the gradient of one step infinite."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            module.by_name["self_distillation"].head.directions.grad[0, 0] = torch.inf


def test_a_skipped_step_leaves_teacher_and_centre_as_they_were(model, tmp_path):
    settings = {"callbacks": [SkipBadSteps(action="skip"), Spoil(1)]}
    _, _, watch = train(model, tmp_path, 3, trainer=settings)
    before, skipped, after = (teacher_of(state) for state in watch.states)
    assert all_equal(before, skipped)
    assert not all_equal(skipped, after)
    assert all(value.isfinite().all() for value in after.values())


def test_a_run_goes_on_to_the_bit_across_the_beginning_of_self_distillation(model, tmp_path):
    whole, _, watch = train(model, tmp_path, 4, objectives=objectives_of(start=2))
    for stop in (1, 3):
        path = tmp_path / f"{stop}.ckpt"
        _, trainer, _ = train(model, tmp_path, stop, objectives=objectives_of(start=2))
        trainer.save_checkpoint(path)
        module, _, rest = train(
            model, tmp_path, 4, start=path, done=stop, objectives=objectives_of(start=2)
        )
        assert all_equal(dict(module.state_dict()), dict(whole.state_dict()))
        assert rest.logged[-1]["train/loss"] == watch.logged[-1]["train/loss"]


def test_an_average_of_the_weights_leaves_the_teacher_and_holds_it(model, tmp_path):
    plain, _, _ = train(model, tmp_path, 3)
    averaging = {"callbacks": [WeightAverage(decay=0.5)]}
    module, trainer, _ = train(model, tmp_path, 3, trainer=averaging)
    path = tmp_path / "average.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    expected = teacher_of(dict(plain.state_dict()))
    assert all_equal(teacher_of(dict(module.state_dict())), expected)
    assert all_equal(teacher_of(saved["state_dict"]), expected)


def test_a_checkpoint_has_the_teacher_and_the_towers_of_it_load_alone(model, tmp_path):
    module, trainer, _ = train(model, tmp_path, 1)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert any(name.startswith("teacher.visual.") for name in names)
    assert "teacher.centres.masked_prediction" in names
    assert not any("teacher" in name for name in module.towers.state_dict())
    alone = SigLipModule(model, pretrained=str(path))
    assert alone.teacher is None
    assert all_equal(dict(alone.towers.state_dict()), dict(module.towers.state_dict()))


def test_a_module_in_half_precision_keeps_its_teacher_in_float32(model):
    module = locked_module(model, objectives=objectives_of()).bfloat16()
    assert {value.dtype for value in module.towers.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in module.teacher.parameters()} == {torch.float32}
    before = [value.clone() for value in module.teacher.parameters()]
    with torch.no_grad():
        for value in module.towers.parameters():
            value += 1
    module.teacher.momentum = 0.999
    module.teacher.follow(module.towers, module.by_name, None)
    moved = [
        not torch.equal(ours, old)
        for ours, old in zip(module.teacher.visual.parameters(), before, strict=False)
    ]
    assert all(moved)  # a step of a thousandth is lost in bfloat16


def test_without_an_objective_of_its_own_there_is_no_teacher_and_no_view(model):
    module = locked_module(model, objectives=[Captioning(layers=1)])
    assert module.teacher is None
    assert module.inputs.views is None
    rule = locked_module(model, objectives=objectives_of()).inputs.views
    assert (rule.local_views, rule.local_size, rule.global_scale) == (2, 16, (0.4, 1.0))
    rule = locked_module(model, objectives=[MaskedPrediction(**SIZES)]).inputs.views
    assert rule.local_views == 0


@pytest.mark.e2e
def test_sharded_runs_take_the_steps_of_one_process(model, tmp_path):
    alone = _run(0, 1, model, str(tmp_path), None)
    for sharding in (None, {}):
        for found in run_ranks(_run, 2, model, str(tmp_path), sharding):
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def _run(rank, world_size, model, folder, sharding):
    """The log of a run of two steps, and of the teacher behind it."""
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    batches = [rows_of(views_of(batch_of(4, seed, torch.float32), seed), rows) for seed in range(8)]
    module = locked_module(model, objectives=objectives_of(), micro_batch_size=1)
    settings = {} if sharding is None else {"strategy": FullyShardedStrategy(**sharding)}
    trainer = fit(
        module,
        folder,
        batches,
        rank,
        world_size,
        max_steps=2,
        gradient_clip_val=1.0,
        **settings,
    )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    wanted = (*(f"train/{name}_{term}" for name in NAMES for term in TERMS), "train/grad_norm")
    return {name: logged[name] for name in wanted}


@pytest.mark.e2e
def test_compiled_views_give_what_eager_ones_give_with_a_graph_for_each_kind(model):
    torch.manual_seed(1)
    towers = build_dual_encoder(model).encoder
    images, token = torch.randn(4, 3, 32, 32), torch.randn(64)
    small = torch.randn(8, 3, 16, 16)
    masks = [torch.rand(4, 4, generator=torch.Generator().manual_seed(s)) < 0.5 for s in (0, 1)]
    views = [(images,), (small,), *((images, mask, token) for mask in masks)]
    expected = [towers.encode_view(*view) for view in views]
    compile_towers(towers, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for view, whole in zip(views, expected, strict=True):
        for ours, theirs in zip(towers.encode_view(*view), whole, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.e2e
def test_fit_reads_views_from_shards_and_tells_of_the_teacher(tmp_path):
    settings = write_settings(tmp_path, max_steps=4, val_check_interval=4)
    content = yaml.safe_load(settings.read_text())
    sizes = {"prototypes": 64, "hidden": 16, "bottleneck": 8}
    asked = {"SelfDistillation": {"local_views": 2, "start": 0.25}, "MaskedPrediction": {}}
    content["model"]["objectives"] = [
        {"class_path": f"dist_siglip.objectives.{name}", "init_args": {**sizes, **own}}
        for name, own in asked.items()
    ]
    settings.write_text(yaml.safe_dump(content))
    run_dir = tmp_path / "run"
    train_run(["fit", "--config", str(settings)]).let_go()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/masked_prediction_entropy" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert "train/self_distillation_loss" not in logged[0]
    for term in TERMS:
        assert f"train/self_distillation_{term}" in logged[1]
    report = (run_dir / "report.html").read_text()
    assert "The teacher of masked prediction" in report
    assert "The teacher of self distillation" in report
    found = load_trained(run_dir=str(run_dir)).encoder
    assert not any("teacher" in name for name in found.state_dict())
    content["model"]["objectives"][0]["init_args"]["centre_momentum"] = 1.0
    settings.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"centre_momentum \(1.0\) must be in \[0, 1\)"):
        train_run(["fit", "--config", str(settings)])


TERMS = ("loss", "entropy", "mean_entropy", "kl", "centre_norm")


def test_what_makes_no_sense_is_refused_in_one_line(model, tmp_path):
    class Cached:
        class features:  # noqa: N801 - stands in for an attribute
            towers = ("image",)

    uneven = [SelfDistillation(local_size=16, **SIZES), MaskedPrediction(global_scale=(0.5, 1))]
    for settings, words in (
        ({"image_tower": TowerConfig(locked=True)}, "objectives train the image tower, which is"),
        ({"patch_dropout": 0.5}, "SelfDistillation needs every patch"),
        (
            {"objectives": objectives_of("sinkhorn"), "micro_batch_size": 2},
            r"assignment \(sinkhorn\) of SelfDistillation needs the whole batch .* is 2",
        ),
        ({"objectives": uneven}, r"global_scale \(\[0.4, 1.0\] and \[0.5, 1\]\) of objectives"),
        ({"objectives": [SelfDistillation(local_size=24)]}, r"local_size \(24\) .* multiple of"),
        ({"teacher_momentum": 1.0}, r"teacher_momentum \(1.0\) must be in"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            locked_module(model, **{"objectives": objectives_of(), **settings})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="need global view, and train_features stand in"):
        refuse_cached(Cached, objectives_of())
    module = locked_module(model, objectives=objectives_of())
    batches = [batch_of(4, 0, torch.float32)]
    with pytest.raises(UserError, match=r"\(SelfDistillation\) need views") as caught:
        fit(module, tmp_path, batches)
    assert "\n" not in str(caught.value)
