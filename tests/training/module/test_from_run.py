"""Going on from another run: what it has goes on to the bit, what it lacks begins fresh."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional

from dist_siglip.data.samples.patches import pack_pictures
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig
from dist_siglip.models.naflex import to_fixed_names
from dist_siglip.models.weights import is_of_another_grid, resample_for_grid
from dist_siglip.objectives import Captioning
from dist_siglip.runs.checkpoints.sharded import by_name
from dist_siglip.training.callbacks import WeightAverage
from dist_siglip.training.callbacks.loggers import MetricsLog
from dist_siglip.training.module.from_run import adopt_optimizer, compare, convert_optimizer
from dist_siglip.training.optim import OptimConfig
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.naflex import FIXED, SIDE
from tests.support.objective_ranks import batch_of, rows_of
from tests.support.processes import run_ranks
from tests.support.schedule_free import ScheduleFreeSGD
from tests.support.self_distillation_ranks import objectives_of, views_of
from tests.support.sharded_ranks import worst_error
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
STEPS, STOP = 5, 3
# A large epsilon keeps Adam from blowing rounding differences up to whole steps.
COSINE = OptimConfig(learning_rate=0.01, epsilon=0.01, warmup_steps=2, schedule_steps=STEPS)
MUON = OptimConfig(
    learning_rate=0.01,
    weight_decay=0.0,
    schedule="constant",
    optimizer=torch.optim.Muon,
    fallback_optimizer=ScheduleFreeSGD,
)
HEADS = "objectives.captioning."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


class Start(Callback):
    """Keeps what there is before the first step."""

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.step = trainer.global_step
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.states = by_name(optimizer.state_dict(), optimizer, pl_module)["state"]
        self.states = {
            name: {key: torch.as_tensor(value).clone() for key, value in state.items()}
            for name, state in self.states.items()
        }


class AtEnd(Callback):
    """Saves while an average and the weights under training are both there."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def stage(model, folder, max_steps, *, start=None, done=0, save=None, rank=0, world_size=1, **more):
    """A run up to a step, from another run's checkpoint or from the beginning."""
    trainer_settings = more.pop("trainer", {})
    module = locked_module(model, **{"optim": COSINE, **more})
    module.other_checkpoint = start
    size = more.get("image_size", 64 if "num_patches" in more else 32)
    batches = []
    for seed in range(done, STEPS + 8):
        batch = batch_of(4, seed, torch.float32)
        images = functional.interpolate(batch.images, (size, size)) if size != 32 else batch.images
        if "num_patches" in more:
            images = pack_pictures(images, SIDE, more["num_patches"])
        rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        batches.append(rows_of(views_of(batch._replace(images=images), seed), rows))
    seen = Start()
    callbacks = [seen, *trainer_settings.pop("callbacks", [])]
    callbacks += [] if save is None else [AtEnd(save)]
    settings = {"max_steps": max_steps, "gradient_clip_val": 1.0, **trainer_settings}
    settings |= {"callbacks": callbacks, "ckpt_path": start}
    trainer = fit(module, folder, batches, rank, world_size, **settings)
    return module, trainer, seen


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        equal(value, theirs[name])
        if isinstance(value, dict)
        else torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name]))
        for name, value in ours.items()
    )


def states_of(trainer, module):
    optimizer = trainer.optimizers[0]
    return by_name(optimizer.state_dict(), optimizer, module)["state"]


def averaged():
    return {"callbacks": [WeightAverage(decay=0.6)]}


@pytest.mark.parametrize(
    ("optim", "with_heads", "trainer"),
    [(COSINE, False, dict), (COSINE, True, averaged), (MUON, True, dict)],
    ids=["AdamW", "heads and an average", "Muon beside a schedule-free one"],
)
def test_without_anything_new_a_second_run_is_the_first_one_going_on(
    model, tmp_path, optim, with_heads, trainer
):
    def settings():
        heads = [Captioning(layers=1)] if with_heads else None
        return {"optim": optim, "objectives": heads, "trainer": trainer()}

    path = tmp_path / "first.ckpt"
    whole, whole_trainer, _ = stage(model, tmp_path, STEPS, **settings())
    stage(model, tmp_path, STOP, save=path, **settings())
    module, second, seen = stage(model, tmp_path, STEPS, start=path, done=STOP, **settings())
    assert seen.step == STOP
    assert equal(dict(module.state_dict()), dict(whole.state_dict()))
    assert equal(states_of(second, module), states_of(whole_trainer, whole))
    for name in ("lr", "weight_decay"):
        rates = [group[name] for group in second.optimizers[0].param_groups]
        assert rates == [group[name] for group in whole_trainer.optimizers[0].param_groups]
    assert not module.fresh_names


def test_a_share_of_the_steps_is_one_of_the_schedule(model, tmp_path):
    """An objective that begins at 60 % of five steps does not begin in a run of three."""
    for steps, begins in ((STOP, False), (STOP + 1, True)):
        heads = Captioning(layers=1, start=0.6)
        module, *_ = stage(model, tmp_path, steps, objectives=[heads])
        assert bool(module.state_dict()[f"{HEADS}output.weight"].any()) == begins


def test_the_same_steps_are_logged_whatever_was_counted_before(model, tmp_path):
    """Lightning counts for its loggers apart, and one more at some starts behind an ended run."""
    first, path = tmp_path / "first.ckpt", tmp_path / "counted.ckpt"
    stage(model, tmp_path, STOP, save=first)
    checkpoint = torch.load(first, weights_only=False)
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    assert counts["_batches_that_stepped"] == STOP
    counts["_batches_that_stepped"] += 1
    torch.save(checkpoint, path)
    trainer = {"logger": MetricsLog(tmp_path), "log_every_n_steps": 2}
    optim = replace(COSINE, schedule_steps=9)
    stage(model, tmp_path, 9, start=path, done=STOP, optim=optim, trainer=trainer)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    # A log that follows no module has Lightning's count of the steps before.
    assert [line["step"] + 1 for line in lines if "train/loss" in line] == [4, 6, 8]


def test_heads_that_a_run_lacks_begin_fresh_and_all_else_goes_on(model, tmp_path):
    path = tmp_path / "first.ckpt"
    first, trainer, _ = stage(model, tmp_path, STOP, save=path)
    settings = {"start": path, "done": STOP, "objectives": [Captioning(layers=1)]}
    module, second, seen = stage(model, tmp_path, STOP + 1, **settings)
    built = locked_module(model, objectives=[Captioning(layers=1)])
    heads = {name for name in seen.weights if name.startswith(HEADS)}
    assert heads
    assert module.fresh_names == heads
    expected = {name: built.state_dict()[name] for name in heads} | dict(first.state_dict())
    assert equal(seen.weights, expected)
    assert equal(seen.states, states_of(trainer, first))  # and no state of heads
    assert seen.step == STOP
    assert seen.rates == pytest.approx([0.01 * 0.5 * (1 + 0.5)] * 2)  # a third of half a cosine
    counts = {name: state["step"].item() for name, state in states_of(second, module).items()}
    assert {counts[name] for name in counts if name in heads} == {1}
    assert {counts[name] for name in counts if name not in heads} == {STOP + 1}
    # Numbers of parameters mean others now: by them the state would be refused, or be another's.
    optimizer = second.optimizers[0]
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(trainer.optimizers[0].state_dict())


def test_heads_that_a_run_no_longer_has_are_left_out(model, tmp_path):
    path = tmp_path / "first.ckpt"
    first, trainer, _ = stage(model, tmp_path, STOP, save=path, objectives=[Captioning(layers=1)])
    module, _, seen = stage(model, tmp_path, STOP + 1, start=path, done=STOP)
    assert set(seen.weights) == set(module.state_dict())
    assert equal(seen.weights, {name: first.state_dict()[name] for name in seen.weights})
    kept = {k: v for k, v in states_of(trainer, first).items() if not k.startswith(HEADS)}
    assert equal(seen.states, kept)


@pytest.mark.e2e
def test_a_teacher_goes_on_is_left_out_or_begins_as_the_student(model, tmp_path):
    path, plain, one = (tmp_path / f"{name}.ckpt" for name in ("first", "plain", "one"))
    asked = {"teacher_momentum": 0.75}
    whole, *_ = stage(model, tmp_path, STEPS, objectives=objectives_of(), **asked)
    stage(model, tmp_path, STOP, save=path, objectives=objectives_of(), trainer=averaged(), **asked)
    settings = {"done": STOP, "objectives": objectives_of(), **asked}
    module, *_ = stage(model, tmp_path, STEPS, start=path, **settings)
    assert equal(dict(module.state_dict()), dict(whole.state_dict()))
    module, _, seen = stage(model, tmp_path, STOP + 1, start=path, done=STOP)
    assert not any(name.startswith(("teacher.", "objectives.")) for name in module.state_dict())
    assert set(seen.weights) == set(module.state_dict())
    for source, heads in ((plain, None), (one, objectives_of()[1:])):
        stage(model, tmp_path, STOP, save=source, objectives=heads, **asked)
        settings["objectives"] = objectives_of()
        module, _, seen = stage(model, tmp_path, STOP + 1, start=source, **settings)
        assert seen.weights["teacher.has_begun"] == (heads is not None)
        state = module.state_dict()
        head = "self_distillation.head.directions"
        ours, theirs = f"teacher.heads.{head.replace('.head', '')}", f"objectives.{head}"
        expected = 0.75 * seen.weights[theirs] + 0.25 * state[theirs]
        assert torch.allclose(state[ours], expected, atol=1e-6)
        assert state["teacher.has_begun"]


def test_an_average_without_its_callback_goes_on_with_the_weights_that_trained(model, tmp_path):
    path = tmp_path / "first.ckpt"
    whole, *_ = stage(model, tmp_path, STEPS)
    stage(model, tmp_path, STOP, save=path, trainer=averaged())
    module, *_ = stage(model, tmp_path, STEPS, start=path, done=STOP)
    assert equal(dict(module.state_dict()), dict(whole.state_dict()))


def test_positions_are_resampled_for_larger_pictures_and_their_moments_begin_anew(model, tmp_path):
    path, name = tmp_path / "first.ckpt", "towers.clip.visual.trunk.pos_embed"
    first, trainer, _ = stage(model, tmp_path, STOP, save=path)
    settings = {"start": path, "done": STOP, "image_size": 64}
    module, second, seen = stage(model, tmp_path, STOP + 1, **settings)
    assert module.resampled_names == {name}
    token, old = first.state_dict()[name].split((1, 4), dim=1)
    side = 2
    grid = old.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    bigger = functional.interpolate(grid, (2 * side, 2 * side), mode="bicubic", antialias=True)
    expected = bigger.permute(0, 2, 3, 1).reshape(1, 4 * side * side, -1)
    expected = torch.cat([token, expected], dim=1)
    assert torch.allclose(seen.weights[name], expected, atol=1e-6)
    states = states_of(trainer, first)
    del states[name]
    assert equal(seen.states, states)
    assert states_of(second, module)[name]["step"].item() == 1
    assert seen.rates == pytest.approx([0.0075] * 2)


KERNEL, ROW = (
    f"towers.clip.visual.trunk.{name}" for name in ("patch_embed.proj.weight", "pos_embed")
)
MATRIX, GRID = (f"towers.clip.visual.trunk.embeds.{name}" for name in ("proj.weight", "pos_embed"))
IN_FORM = {
    KERNEL: (MATRIX, lambda value: value.permute(0, 2, 3, 1).flatten(1)),
    KERNEL.replace("weight", "bias"): (MATRIX.replace("weight", "bias"), lambda value: value),
    ROW: (GRID, lambda value: value.unflatten(1, (8, 8))),
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A model of squares of 8 x 8 patches, and the checkpoint of a run of it."""
    folder = tmp_path_factory.mktemp("squares")
    fixed = write_config(folder / "fixed.json", FIXED)
    first, trainer, _ = stage(fixed, folder, STOP, image_size=64, save=folder / "first.ckpt")
    return fixed, folder / "first.ckpt", first, trainer


def flexible(values):
    """Weights or states of a fixed tower as those of a NaFlex tower, from the definition."""
    found = {}
    for name, value in values.items():
        new, change = IN_FORM.get(name, (name, lambda value: value))
        is_state = isinstance(value, dict)
        found[new] = (
            {key: change(each) if each.ndim else each for key, each in value.items()}
            if is_state
            else change(value)
        )
    return found


class Features(Callback):
    """Keeps what pictures are encoded as before the first step."""

    def __init__(self, images):
        self.images = images

    @torch.no_grad()
    def on_train_start(self, trainer, pl_module):
        towers = pl_module.towers.eval()
        self.found = towers.encode_image(self.images)
        towers.train()


def test_a_run_of_squares_goes_on_with_pictures_of_any_shape(squares, tmp_path):
    """On squares it takes the steps that the first run would have taken."""
    fixed, path, first, trainer = squares
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    before = Features(pack_pictures(images, SIDE, 70))
    settings = {"start": path, "done": STOP, "num_patches": 64, "trainer": {"callbacks": [before]}}
    module, second, seen = stage(fixed, tmp_path, STEPS, **settings)
    with torch.no_grad():
        expected = first.towers.eval().encode_image(images)
    assert torch.allclose(before.found, expected, atol=1e-6)
    assert seen.step == STOP
    assert equal(seen.weights, flexible(dict(first.state_dict())))
    assert equal(seen.states, flexible(states_of(trainer, first)))
    assert not module.fresh_names
    assert not module.resampled_names
    whole, *_ = stage(fixed, tmp_path, STEPS, start=path, done=STOP, image_size=64)
    expected = flexible(dict(whole.state_dict()))
    assert worst_error(dict(module.state_dict()), expected, seen.weights) < 1e-3
    counts = {state["step"].item() for state in states_of(second, module).values()}
    assert counts == {STEPS}
    # Moments in the order of a convolution, as if nothing had to change, are other steps.
    lost = dict(torch.load(path, weights_only=True))
    states = lost["optimizer_states"][0]["state"]
    states[KERNEL] = {
        key: value.permute(0, 2, 3, 1).reshape(value.shape) if value.ndim else value
        for key, value in states[KERNEL].items()
    }
    torch.save(lost, tmp_path / "other.ckpt")
    settings |= {"start": tmp_path / "other.ckpt", "trainer": {}}
    other, *_ = stage(fixed, tmp_path, STEPS, **settings)
    kernel = {MATRIX: expected[MATRIX]}
    assert worst_error(dict(other.state_dict()), kernel, seen.weights) > 1e-2


def test_a_run_of_any_shape_goes_on_with_squares_and_grids_are_resized(squares, tmp_path):
    fixed, path, _, _ = squares
    settings = {"start": path, "done": STOP, "num_patches": 64, "save": tmp_path / "any.ckpt"}
    module, trainer, _ = stage(fixed, tmp_path, STOP + 1, **settings)
    back, _, seen = stage(
        fixed, tmp_path, STEPS, start=tmp_path / "any.ckpt", done=STOP + 1, image_size=64
    )
    expected = {
        "towers.clip." + name: value
        for name, value in to_fixed_names(module.towers.clip.state_dict()).items()
    }
    assert equal({name: seen.weights[name] for name in expected}, expected)
    assert equal(flexible(seen.states), states_of(trainer, module))
    assert not back.resampled_names
    # The model's own grid is another one now.
    other = {**FIXED, "vision_cfg": {**FIXED["vision_cfg"], "image_size": 48}}
    other = write_config(tmp_path / "other.json", other)
    for start in (path, tmp_path / "any.ckpt"):
        settings = {"start": start, "done": STOP, "num_patches": 64}
        resized, _, seen = stage(other, tmp_path, STOP + 2, **settings)
        assert resized.resampled_names == {GRID}
        row = torch.load(start, weights_only=True)["state_dict"]
        grid = (row[ROW].unflatten(1, (8, 8)) if ROW in row else row[GRID]).permute(0, 3, 1, 2)
        smaller = functional.interpolate(grid, (6, 6), mode="bilinear", antialias=True)
        assert torch.allclose(seen.weights[GRID], smaller.permute(0, 2, 3, 1), atol=1e-6)
        assert GRID not in seen.states


def test_what_is_no_moment_begins_anew_in_another_form(squares):
    fixed, _, first, _ = squares
    shapes = {name: value.shape for name, value in first.state_dict().items()}
    rows = {"step": torch.tensor(3.0), "row": torch.zeros(64)}  # a factor, as Adafactor has it
    saved = {"state": {KERNEL: rows, "logits.log_scale": {"step": 1}}, "param_groups": []}
    module = locked_module(fixed, num_patches=64)
    found = convert_optimizer(module, saved, shapes)
    assert found["state"] == {"logits.log_scale": {"step": 1}}


def test_squares_of_another_architecture_are_refused_in_one_line(model, squares, tmp_path):
    wide = {**FIXED, "vision_cfg": {**FIXED["vision_cfg"], "width": 96}}
    wide = write_config(tmp_path / "wide.json", wide)
    shapes = {name: value.shape for name, value in squares[2].state_dict().items()}
    without_pooling = {k: v.shape for k, v in locked_module(model).state_dict().items()}
    for config, stored, said in (
        (wide, shapes, r"proj.weight is \(64, 192\) instead of \(96, 192\)"),
        (squares[0], without_pooling, r"missing towers.clip.visual.trunk.embeds.pos_embed"),
    ):
        module = locked_module(config, num_patches=64)
        with pytest.raises(UserError, match=rf"of another architecture: .*{said}") as caught:
            compare(module, stored, tmp_path)
        assert "\n" not in str(caught.value)


def _any_shape_on_ranks(rank, world_size, model, folder):
    """Runs of squares that go on with any shape, on 2 ranks: DDP, shards of a file and a folder."""
    common = {"rank": rank, "world_size": world_size}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    sharded = FullyShardedStrategy(checkpoint="sharded")
    settings = {"trainer": {"strategy": sharded}, "save": f"{folder}/shards.ckpt"}
    stage(model, folder, STOP, image_size=64, **common, **settings)
    found = []
    for name, strategy in (
        ("first", "ddp"),
        ("first", FullyShardedStrategy()),
        ("shards", FullyShardedStrategy()),
    ):
        settings = {"start": Path(f"{folder}/{name}.ckpt"), "done": STOP, "num_patches": 64}
        module, *_ = stage(
            model, folder, STEPS, trainer={"strategy": strategy}, **settings, **common
        )
        state = get_model_state_dict(module, options=whole)
        found.append({k: v.clone() for k, v in state.items()})
    return found


@pytest.mark.e2e
def test_ranks_and_shards_go_on_with_any_shape_as_one_process_does(squares, tmp_path):
    fixed, path, first, _ = squares
    whole, *_ = stage(fixed, tmp_path, STEPS, start=path, done=STOP, image_size=64)
    start = flexible(dict(first.state_dict()))
    expected = flexible(dict(whole.state_dict()))
    (tmp_path / "first.ckpt").write_bytes(path.read_bytes())
    for state in run_ranks(_any_shape_on_ranks, 2, fixed, str(tmp_path))[0]:
        assert worst_error(state, expected, start) < 1e-3


def test_other_models_are_refused_in_one_line(model, tmp_path):
    stored = {k: v.shape for k, v in locked_module(model).state_dict().items()}
    with_heads = locked_module(model, objectives=[Captioning(layers=1)]).state_dict()
    with_heads = {name: value.shape for name, value in with_heads.items()}
    tiny = ARCHITECTURES["siglip"]
    wider = {**tiny, "text_cfg": {**tiny["text_cfg"], "width": 32}}
    other = write_config(tmp_path / "other.json", wider)
    relative = LogitConfig(bias_parameterization="relative")
    cases = [
        (locked_module(other), stored, r"text.positional_embedding is \(8, 16\) instead"),
        (locked_module(model, logits=relative), stored, "missing logits.relative_bias"),
        (
            locked_module(model, objectives=[Captioning(layers=2)]),
            with_heads,
            rf"missing {HEADS}decoder.",  # the half of a decoder is none
        ),
        (
            locked_module(model, objectives=[Captioning(layers=1)]),
            {**with_heads, f"{HEADS}output.weight": torch.Size([7, 16])},
            rf"{HEADS}output.weight is \(7, 16\) instead",
        ),
    ]
    for module, shapes, said in cases:
        with pytest.raises(UserError, match=rf"of another architecture: .*{said}") as caught:
            compare(module, shapes, tmp_path)
        assert "\n" not in str(caught.value)
    # Positions that are no square grid.
    name = "towers.clip.visual.trunk.pos_embed"
    with pytest.raises(UserError, match=r"pos_embed is \(1, 4, 64\) instead of \(1, 5, 64\)"):
        compare(locked_module(model), {**stored, name: torch.Size([1, 4, 64])}, tmp_path)


def test_a_kernel_of_other_patches_gives_the_same_for_pictures_enlarged_alike(model):
    """From patches of 8 to those of 16."""
    torch.manual_seed(0)
    network = locked_module(model).towers.clip
    name = "visual.trunk.patch_embed.proj.weight"
    shape = network.get_parameter(name).shape
    old = torch.randn(*shape[:2], 8, 8)
    assert is_of_another_grid(network, name, old.shape, shape)
    assert not is_of_another_grid(network, name, torch.Size([1, 3, 8, 8]), shape)
    new = resample_for_grid(network, name, old, Path("of.ckpt"))
    patches = torch.randn(5, 3, 8, 8)
    larger = functional.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    expected = torch.einsum("bchw,ochw->bo", patches, old)
    assert torch.allclose(torch.einsum("bchw,ochw->bo", larger, new), expected, atol=1e-3)
    plain = functional.interpolate(old, (16, 16), mode="bicubic", antialias=True) / 4
    assert not torch.allclose(torch.einsum("bchw,ochw->bo", larger, plain), expected, atol=0.1)


def test_groups_keep_what_they_count_and_take_decay_from_the_settings():
    saved = {"state": {}, "param_groups": [{"name": "decay", "k": 3, "weight_decay": 0.1}]}
    now = {"name": "decay", "params": ["a"], "k": 0, "weight_decay": 0.0, "betas": (0.9, 0.95)}
    other = {"name": "decay, learning rate x 0.1", "params": ["b"], "k": 0, "weight_decay": 0.2}
    found = adopt_optimizer(saved, {"param_groups": [now, other]})
    assert found == {"state": {}, "param_groups": [{**now, "k": 3}, other]}


def _stages_on_ranks(rank, world_size, model, folder):
    """Second runs with heads and larger pictures on 2 ranks: DDP, shards of a file and a folder."""
    common = {"rank": rank, "world_size": world_size}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    sharded = FullyShardedStrategy(checkpoint="sharded")
    settings = {"trainer": {"strategy": sharded}, "save": f"{folder}/shards.ckpt"}
    stage(model, folder, STOP, **common, **settings)
    found = []
    for start, strategy in (
        (f"{folder}/first.ckpt", "ddp"),
        (f"{folder}/first.ckpt", FullyShardedStrategy()),
        (f"{folder}/shards.ckpt", FullyShardedStrategy()),
    ):
        module, *_ = stage(
            model,
            folder,
            STEPS,
            start=Path(start),
            done=STOP,
            objectives=[Captioning(layers=1)],
            image_size=64,
            trainer={"strategy": strategy},
            **common,
        )
        state = get_model_state_dict(module, options=whole)
        names = [sorted(each) for each in (module.fresh_names, module.resampled_names)]
        found.append(({k: v.clone() for k, v in state.items()}, names))
    return found


@pytest.mark.e2e
def test_ranks_and_shards_go_on_as_one_process_does(model, tmp_path):
    path = tmp_path / "first.ckpt"
    stage(model, tmp_path, STOP, save=path)
    settings = {"start": path, "done": STOP, "image_size": 64}
    module, _, seen = stage(model, tmp_path, STEPS, objectives=[Captioning(layers=1)], **settings)
    expected = dict(module.state_dict())
    found = run_ranks(_stages_on_ranks, 2, model, str(tmp_path))
    for state, (fresh, resampled) in found[0]:
        assert worst_error(state, expected, seen.weights) < 1e-3
        assert fresh == sorted(module.fresh_names)
        assert resampled == sorted(module.resampled_names)
    # A second run whose moments begin anew, as from weights alone, is another one.
    lost = dict(torch.load(path, weights_only=True))
    lost["optimizer_states"] = [{**lost["optimizer_states"][0], "state": {}}]
    torch.save(lost, path)
    other, *_ = stage(model, tmp_path, STEPS, objectives=[Captioning(layers=1)], **settings)
    assert worst_error(dict(other.state_dict()), expected, seen.weights) > 1e-2
