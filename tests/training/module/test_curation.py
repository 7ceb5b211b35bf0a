"""Steps that choose their pairs: the same on any ranks, resumed to the bit, and what they log."""

import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.distributed import gather_rows, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.losses import ClipLoss, DistillationLoss, SigLipLoss, TeacherFeatures
from dist_siglip.losses.research.curation import LearnabilityScores, choose_learnable
from dist_siglip.models import build_dual_encoder, evaluation_mode
from dist_siglip.objectives import Captioning
from dist_siglip.objectives.objective import uniform
from dist_siglip.training.callbacks import AtomicCheckpointIO
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import curation
from dist_siglip.training.module.curation import CurationConfig
from dist_siglip.training.module.teachers import TeacherConfig
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.shards import caption, encode, picture, write_shard
from tests.support.teacher_ranks import Watch, write_teacher
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model"),
]

LOADED, STEPS = 12, 3
HALF = CurationConfig(filter_ratio=0.5, chunks=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"), "alike", ARCHITECTURES["clip"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    members = [
        (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in range(20)
    ]
    return str(write_shard(tmp_path_factory.mktemp("shards") / "00000.tar", members))


def batches_of(rank=0, world_size=1):
    """A rank's rows of large batches of bytes; two captions are the same."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(STEPS):
        images = torch.randint(256, (LOADED, 3, 32, 32), generator=generator).byte()
        texts = torch.randint(1, 40000, (LOADED, 8), generator=generator)
        texts[:, -1] = 49407
        texts[7] = texts[2]
        ids = torch.arange(LOADED)
        captions = ids.clone()
        captions[7] = 2
        draws = torch.randint(2**62, (LOADED,), generator=generator)
        whole = ImageTextBatch(
            images, texts, captions, 100 * step + ids, ids >= 0, ids < 0, draws=draws
        )
        rows = slice(rank * LOADED // world_size, (rank + 1) * LOADED // world_size)
        found.append(ImageTextBatch(*(None if part is None else part[rows] for part in whole)))
    return found


def module_of(model, teacher, **settings):
    given = {"curation": HALF, "global_batch_size": LOADED, "loss": SigLipLoss()} | settings
    teachers = [] if teacher is None else [TeacherConfig(**teacher)]
    return locked_module(model, teachers=teachers, **given)


def note_ids(module):
    """Keep the sample ids of the pairs that train in each step."""
    seen, finish = [], module.finish_step

    def noting(batch, *args, **kwargs):
        seen.append(batch.sample_ids.tolist())
        return finish(batch, *args, **kwargs)

    module.finish_step = noting
    return seen


def train(model, folder, teacher, case, rank=0, world_size=1):
    """Return whole parameters, sample ids of this rank and the log of each step."""
    warnings.simplefilter("ignore")
    loss = case.get("loss", SigLipLoss)()
    objectives = [Captioning(layers=1)] if case.get("has_objective") else None
    settings = {"loss": loss, "objectives": objectives, **case.get("module", {})}
    module = module_of(model, teacher, **settings)
    seen, watch = note_ids(module), Watch()
    strategy = {"strategy": FullyShardedStrategy()} if case.get("sharded") else {}
    if world_size == 1:
        strategy = {}
    batches = batches_of(rank, world_size)
    options = {**strategy, **case.get("trainer", {})}
    fit(module, folder, batches, rank, world_size, callbacks=[watch], **options)
    state = {}
    for name, value in module.state_dict().items():
        state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return state, seen, watch.logged


def positive_duplicates():
    return SigLipLoss(duplicates="positive")


CASES = [
    {},
    {"loss": positive_duplicates, "module": {"micro_batch_size": 2}, "has_objective": True},
    {"loss": DistillationLoss, "module": {"curation": CurationConfig(filter_ratio=0.5, chunks=1)}},
    {"sharded": True, "module": {"micro_batch_size": 1}},
]


def train_rank(rank, world_size, model, folder, teacher, cases):
    return [train(model, folder, teacher, case, rank, world_size) for case in cases]


@pytest.mark.e2e
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_choose_and_train_as_one(model, teacher, tmp_path, world_size):
    expected = [train(model, tmp_path, teacher, case) for case in CASES]
    found = run_ranks(train_rank, world_size, model, str(tmp_path), teacher, CASES)
    for number, (whole, seen, logged) in enumerate(expected):
        start = module_of(
            model,
            teacher,
            loss=CASES[number].get("loss", SigLipLoss)(),
            objectives=[Captioning(layers=1)] if CASES[number].get("has_objective") else None,
        ).state_dict()
        for step, ids in enumerate(seen):
            parts = [of_rank[number][1][step] for of_rank in found]
            assert {len(part) for part in parts} == {LOADED // 2 // world_size}
            assert [each for part in parts for each in part] == ids == sorted(ids)
            theirs = found[-1][number][2][step]
            for name in ("loss", "curation_learnability", "curation_learnability_all"):
                assert theirs[f"train/{name}"] == pytest.approx(
                    logged[step][f"train/{name}"], rel=1e-4, abs=1e-6
                )
        assert worst_error(found[0][number][0], whole, start) < 1e-4


def step_gradients(rank, world_size, model, teacher):
    """Chosen ids of all ranks and the mean gradient of a step, of each batch."""
    loss = SigLipLoss(duplicates="positive", mined_negatives=2)
    module, found = module_of(model, teacher, loss=loss), []
    for step, batch in enumerate(batches_of(rank, world_size)):
        with evaluation_mode(module.towers):
            chosen, _, terms = curation.curate(
                batch,
                module.encode,
                *module.logits(),
                teachers=module.teachers,
                loss=loss,
                config=HALF,
                step=step,
                micro_batch_size=None,
            )
        module.zero_grad()
        value = loss(*module.encode(chosen), *module.logits(), caption_ids=chosen.caption_ids)
        value.backward()
        gradients = {
            name: sum_over_ranks(parameter.grad) / world_size
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        gradients |= {name: sum_over_ranks(term) / world_size for name, term in terms.items()}
        found.append((gather_rows(chosen.sample_ids).tolist(), gradients))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_choice_and_gradients_of_a_step_are_those_of_one_process(model, teacher, world_size):
    alone = step_gradients(0, 1, model, teacher)
    for of_rank in run_ranks(step_gradients, world_size, model, teacher):
        for (ids, gradients), (expected, truth) in zip(of_rank, alone, strict=True):
            assert ids == expected
            assert gradients.keys() == truth.keys()
            for name, value in gradients.items():
                error = (value - truth[name]).abs().max() / truth[name].abs().max()
                assert error < 1e-4, name


def test_a_step_trains_the_chosen_pairs_alone_and_logs_what_they_promise(model, teacher, tmp_path):
    case = {"loss": positive_duplicates}
    _, (ids, *_), (logged, *_) = train(model, tmp_path, teacher, case)
    module = module_of(model, teacher)
    batch = batches_of()[0]
    with torch.no_grad(), evaluation_mode(module.towers):
        image, text = module.towers(batch.images, batch.texts)
        scale, bias = (value.item() for value in module.logits())
        said = module.teachers.features_of(batch, None)
    learner = TeacherFeatures(image, text, (image.shape[1],), (scale,), (bias,))
    scores = LearnabilityScores(learner, said, batch.caption_ids, "positive")
    streams = [uniform(batch.draws, curation._FIRST_STREAM + chunk) for chunk in range(3)]
    positions = choose_learnable(scores, torch.stack(streams, dim=1), LOADED // 2).positions
    assert ids == positions.tolist()
    loss = SigLipLoss(duplicates="positive")(
        image[positions],
        text[positions],
        *module.logits(),
        caption_ids=batch.caption_ids[positions],
    )
    assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["train/curation_share"] == 0.5
    own = scores.own
    assert logged["train/curation_learnability"] == pytest.approx(own[positions].mean().item())
    assert logged["train/curation_learnability_all"] == pytest.approx(own.mean().item())


def test_scoring_in_bf16_leaves_no_cast_weights_to_the_step(model, teacher, tmp_path):
    start = module_of(model, teacher).state_dict()

    def moved(case):
        state = train(model, tmp_path, teacher, case)[0]
        return {name for name, value in state.items() if not torch.equal(value, start[name])}

    assert moved({"trainer": {"precision": "bf16-mixed"}}) == moved({}) != set()


def data_of(shards, module, **settings):
    given = {"train_shards": shards, "global_batch_size": 8, "workers_per_rank": 0}
    given |= {"train_crop_scale": None, "inputs": module.inputs, "seed": 4}
    return ImageTextDataModule(**given | settings)


def run_on(shards, module, folder, steps, start=None, **settings):
    """Train on shards; return the sample ids of each step, and the trainer."""
    seen = note_ids(module)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=-1,
        max_steps=steps,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data_of(shards, module, **settings), ckpt_path=start)
    return seen, trainer


def test_a_run_that_is_stopped_in_an_epoch_chooses_on_to_the_bit(model, teacher, shards, tmp_path):
    def fresh():
        return module_of(model, teacher, global_batch_size=8)

    module, first, second = fresh(), fresh(), fresh()
    whole, _ = run_on(shards, module, tmp_path, 5)
    before, trainer = run_on(shards, first, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    after, trainer = run_on(shards, second, tmp_path, 5, str(tmp_path / "three.ckpt"))
    assert before + after == whole
    assert trainer.datamodule.progress.samples_consumed == 40
    ours, theirs = second.state_dict(), module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    crops, _ = run_on(shards, fresh(), tmp_path, 5, seed=5)
    assert crops != whole


def test_stored_rows_choose_what_the_live_reference_chooses(
    model, teacher, shards, tmp_path_factory, tmp_path
):
    table = build_pair_table([shards], image_extensions=("png",))
    folder = tmp_path_factory.mktemp("rows")
    settings = EmbedSettings(towers="both", format="features", dtype="float32", workers=0)
    embed_shards(table, build_dual_encoder(**teacher), folder, settings)
    found = [
        run_on(shards, module_of(model, each, global_batch_size=8), tmp_path, 3)[0]
        for each in (teacher, {"features": str(folder)})
    ]
    assert found[0] == found[1]


def test_the_batch_of_the_run_is_that_which_trains(model, teacher):
    module = module_of(model, teacher, global_batch_size=16)
    assert module.global_batch_size == 8
    assert module.loaded_batch_size == 16
    assert module_of(model, teacher, global_batch_size=None).global_batch_size is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"curation": CurationConfig(filter_ratio=1.0)}, r"filter_ratio \(1.0\) must be between"),
        ({"curation": CurationConfig(filter_ratio=0.0)}, r"filter_ratio \(0.0\) must be between"),
        ({"curation": CurationConfig(chunks=0)}, r"curation.chunks \(0\) must be at least 1"),
        ({"curation": CurationConfig()}, r"leaves 6 of global_batch_size \(12\) pairs, fewer than"),
        ({"loss": ClipLoss()}, r"curation scores pairs by the sigmoid loss, and loss \(ClipLoss\)"),
        ({"teacher": None}, "curation needs a reference model; list it in model.teachers"),
        ({"curation": None}, r"loss \(SigLipLoss\) takes no teachers"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(model, teacher, settings, words):
    given = dict(settings)
    with pytest.raises(UserError, match=words) as caught:
        module_of(model, given.pop("teacher", teacher), **given)
    assert "\n" not in str(caught.value)


def test_a_share_that_ranks_cannot_have_equally_is_refused(model, teacher):
    with pytest.raises(UserError, match=r"leaves 6 of .* which 4 ranks cannot share equally"):
        module_of(model, teacher).check_ranks(4)  # which fit does before it writes anything
    module_of(model, teacher).check_ranks(3)
    module_of(model, teacher, global_batch_size=None).check_ranks(4)
