import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint

from dist_siglip.data.order.sequence import epoch_order
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.regions import RegionRule
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule import ImageTextDataModule, TrainSource
from tests.support.shards import (
    UNEVEN,
    caption,
    encode,
    picture,
    tiny_inputs,
    write_shard,
    write_shards,
)

pytestmark = [
    # lightning 2.6 builds pytree leaves in a way that torch 2.15 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # Small runs: the worker count is what the test asks for.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Python 3.12 warns wherever a process with threads forks.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    # Runs that resume write into the folder they were started from.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Three loader processes on a machine of two cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),
]


class Recorder(LightningModule):
    """Trains one number and writes down every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        self.batches.append((batch.sample_ids.tolist(), batch.images.clone()))
        return (self.weight - batch.images.mean()).square().sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def make_data(shards, **options):
    settings = {
        "train_shards": shards,
        "inputs": tiny_inputs(),
        "global_batch_size": 8,
        "workers_per_rank": 0,
        "seed": 3,
        "block_shards": 2,
        "train_crop_scale": (0.3, 1.0),
    }
    return ImageTextDataModule(**settings | options)


def make_trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**settings | options)


def assert_same_batches(seen, expected):
    assert [ids for ids, _ in seen] == [ids for ids, _ in expected]
    for (_, ours), (_, theirs) in zip(seen, expected, strict=True):
        assert torch.equal(ours, theirs)


def run_to(step, data, folder, checkpoint=None, **options):
    module, trainer = Recorder(), make_trainer(folder, max_steps=step, **options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{step}.ckpt")
    return module.batches


def test_training_visits_the_order_of_the_seed(shards, tmp_path):
    batches = run_to(6, make_data(shards), tmp_path)
    order = [*epoch_order(3, 0, UNEVEN, 2)[:32], *epoch_order(3, 1, UNEVEN, 2)[:16]]
    assert [i for ids, _ in batches for i in ids] == order


@pytest.mark.parametrize(("count", "workers"), [(1, 2), (3, 0)])
def test_overfitting_takes_the_same_batches_in_turns(shards, tmp_path, count, workers):
    """Lightning's own way takes the first batches of every epoch, which are others in each."""
    expected = run_to(count, make_data(shards), tmp_path)
    data = make_data(shards, workers_per_rank=workers)
    seen = run_to(7, data, tmp_path, overfit_batches=count)
    assert_same_batches(seen, (expected * 7)[:7])
    # A run that goes on is where it was in its turns.
    again = make_data(shards)
    rest = run_to(9, again, tmp_path, tmp_path / "7.ckpt", overfit_batches=count)
    assert_same_batches(seen + rest, (expected * 9)[:9])


def test_a_share_of_a_run_without_end_cannot_be_overfitted(shards, tmp_path):
    with pytest.raises(UserError, match=r"overfit_batches \(0.5\) must be a whole number"):
        run_to(2, make_data(shards), tmp_path, overfit_batches=0.5)


def test_resume_twice_in_an_epoch_and_across_one_repeats_an_uninterrupted_run(shards, tmp_path):
    expected = run_to(11, make_data(shards), tmp_path)
    seen, checkpoint = [], None
    for step, workers in ((1, 2), (3, 1), (6, 0), (7, 2), (11, 0)):  # four steps an epoch
        data = make_data(shards, workers_per_rank=workers)
        seen += run_to(step, data, tmp_path, checkpoint)
        checkpoint = tmp_path / f"{step}.ckpt"
        assert data.progress.samples_consumed == 8 * step
    assert_same_batches(seen, expected)


def test_checkpoint_of_a_step_has_counted_that_step(shards, tmp_path):
    def run(checkpoint=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"enable_checkpointing": True, "callbacks": [saver]}
        return run_to(6, make_data(shards), tmp_path, checkpoint, **options)

    expected = run()
    for step in (2, 4):
        path = tmp_path / f"step={step}.ckpt"
        state = torch.load(path, weights_only=True)["ImageTextDataModule"]
        assert state["samples_consumed"] == 8 * step
        assert_same_batches(run(path), expected[step:])


def test_checkpoint_written_during_validation_resumes_exactly(shards, tmp_path):
    class Save(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "validating.ckpt")

    options = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    data = {"val_shards": shards, "val_local_batch_size": 10}
    expected = run_to(6, make_data(shards, **data), tmp_path, callbacks=[Save()], **options)
    path = tmp_path / "validating.ckpt"
    resumed = run_to(6, make_data(shards, **data), tmp_path, path, **options)
    assert_same_batches(resumed, expected[3:])


def test_checkpoint_state_is_plain_values(shards, tmp_path):
    run_to(2, make_data(shards), tmp_path)
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["ImageTextDataModule"]
    fingerprint, lines = state.pop("fingerprint"), state.pop("shards")
    assert [line.split("\t")[:2] for line in lines.split("\n")] == [
        [f"{number:05d}.tar", str(count)] for number, count in enumerate(UNEVEN)
    ]
    assert isinstance(fingerprint, str)
    assert state == {
        "samples_consumed": 16,
        "seed": 3,
        "global_batch_size": 8,
        "block_shards": 2,
        "num_samples": 37,
        "sources": "",
    }


def test_short_epochs_of_the_trainer_go_on_in_the_data(shards, tmp_path):
    expected = run_to(6, make_data(shards), tmp_path)
    short = run_to(6, make_data(shards), tmp_path, limit_train_batches=2)
    assert_same_batches(short, expected)


def test_second_fit_goes_on(shards, tmp_path):
    expected = run_to(6, make_data(shards), tmp_path)
    data, module, trainer = make_data(shards), Recorder(), make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, datamodule=data)
    assert_same_batches(module.batches, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3 .* is 4 now"),
        ({"global_batch_size": 4}, "global_batch_size was 8 .* is 4 now"),
        ({"block_shards": 3}, "block_shards was 2 .* is 3 now"),
        (
            {"train_shards": slice(0, 5)},
            r"1 shard is gone \(first '00005.tar'\); 37 samples then, 34 now",
        ),
        ({"train_shards": slice(None, None, -1)}, "the same shards in another order"),
    ],
)
def test_resume_with_other_data_or_batches_is_refused(shards, tmp_path, change, message):
    run_to(1, make_data(shards), tmp_path)
    if "train_shards" in change:
        change = {"train_shards": shards[change["train_shards"]]}
    with pytest.raises(UserError, match=message) as info:
        run_to(2, make_data(shards, **change), tmp_path, tmp_path / "1.ckpt")
    assert "\n" not in str(info.value)


def test_changed_data_are_accepted_on_request_from_the_next_epoch_on(shards, tmp_path):
    run_to(1, make_data(shards), tmp_path)
    data = make_data(shards[:5], accept_changed_data=True)
    batches = run_to(2, data, tmp_path, tmp_path / "1.ckpt")
    assert batches[0][0] == epoch_order(3, 1, UNEVEN[:5], 2)[:8].tolist()
    assert data.progress.samples_consumed == 5 * 8  # four batches of epoch 0 are passed over


def mixture(shards):
    return {
        "train_shards": None,
        "train_sources": [
            TrainSource(name="odd", shards=shards[::2], weight=3.0),
            TrainSource(name="even", shards=shards[1::2], weight=1.0),
        ],
    }


def test_a_mixture_resumes_exactly_over_the_epochs_of_its_sources(shards, tmp_path):
    expected = run_to(11, make_data(shards, **mixture(shards)), tmp_path)
    seen, checkpoint = [], None
    for step, workers in ((1, 2), (3, 1), (6, 0), (7, 3), (11, 0)):  # "odd" has 28 samples
        data = make_data(shards, workers_per_rank=workers, **mixture(shards))
        seen += run_to(step, data, tmp_path, checkpoint)
        checkpoint = tmp_path / f"{step}.ckpt"
    assert_same_batches(seen, expected)
    epochs = data.epochs()
    assert sorted(epochs) == ["data/even/epochs", "data/odd/epochs"]
    assert epochs["data/odd/epochs"] * 28 + epochs["data/even/epochs"] * 9 == pytest.approx(88)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_shards": ["a.tar"]}, "train_shards and train_sources are both set"),
        ({"train_sources": []}, "train_sources name no source"),
    ],
)
def test_sources_that_contradict_are_refused(shards, change, message):
    with pytest.raises(UserError, match=message):
        make_data(shards, **{**mixture(shards), **change})


def test_sources_must_be_named_apart_and_weighed_alike(shards):
    first = TrainSource(name="a", shards=shards[:2])
    for second, message in (
        (TrainSource(name="a", shards=shards[2:]), "name 'a' twice"),
        (TrainSource(name="b", shards=shards[2:], weight=2.0), "all sources a weight, or none"),
    ):
        with pytest.raises(UserError, match=message):
            make_data(None, train_sources=[first, second])
    with pytest.raises(UserError, match=r"weight \(0\) of source 'c' must be > 0"):
        make_data(None, train_sources=[TrainSource(name="c", shards=shards, weight=0)])


def test_a_shard_belongs_to_one_source(shards):
    both = [TrainSource(name=name, shards=shards[:1]) for name in "ab"]
    with pytest.raises(UserError, match=r"train_sources names .* twice"):
        make_data(None, train_sources=both).check(1)


def test_sources_without_weights_are_drawn_in_proportion_to_their_samples(shards):
    sources = [
        TrainSource(name=name, shards=part)
        for name, part in zip("ab", (shards[:3], shards[3:]), strict=True)
    ]
    data = make_data(None, train_sources=sources)
    data.setup("fit")
    assert [source.weight for source in data.plan.sources] == [20, 17]


def test_validation_reads_every_pair_once_in_data_order(shards, tmp_path):
    module, trainer = Recorder(), make_trainer(tmp_path)
    data = make_data(None, val_shards=shards, val_local_batch_size=10)
    trainer.validate(module, datamodule=data, verbose=False)
    assert [len(batch.valid) for batch in module.evaluated] == [10, 10, 10, 7]
    assert torch.cat([b.sample_ids for b in module.evaluated]).tolist() == [*range(37)]
    assert all(bool(batch.valid.all()) for batch in module.evaluated)
    assert data.val_dataset.raw(5) == (encode(picture(5)), "image/png", caption(5))


def test_validation_of_a_checkpoint_needs_no_training_shards(shards, tmp_path):
    run_to(1, make_data(shards), tmp_path)
    module, data = Recorder(), make_data(None, val_shards=shards[:1])
    make_trainer(tmp_path).validate(module, data, ckpt_path=tmp_path / "1.ckpt", verbose=False)
    assert len(module.evaluated) == 1


def test_bad_samples_are_counted_and_too_many_stop_the_run(shards, tmp_path):
    members = [
        (f"{i}", {"png": b"junk" if i == 4 else encode(picture(i)), "txt": b"text"})
        for i in range(16)
    ]
    path = str(write_shard(tmp_path / "bad.tar", members))
    data = make_data(path, max_bad_fraction=0.1)
    run_to(20, data, tmp_path)
    assert data.num_substituted == 10  # once an epoch of two steps
    log = str(tmp_path / "bad_samples.jsonl")
    text = (
        r"max_bad_fraction \(0\.05\) is exceeded: 10 of 160 .*\(first .*bad\.tar/4: picture cannot"
        r".*; all in .*bad_samples\.jsonl"
    )
    with pytest.raises(UserError, match=text):
        run_to(20, make_data(path, max_bad_fraction=0.05, bad_sample_log=log), tmp_path)
    assert len(Path(log).read_text().splitlines()) >= 10  # loaders read ahead


def shout(samples):
    for sample in samples:
        yield {**sample, "text": sample["text"].upper()}


def test_captions_stages_and_damage_are_settings_of_the_data(tmp_path):
    members = [
        (f"{i}", {"png": encode(picture(i)), "json": b'{"alt": "number %d"}' % i}) for i in range(8)
    ]
    members.append(("incomplete", {"json": b"{}"}))
    path = str(write_shard(tmp_path / "a.tar", members))
    options = {
        "captions": CaptionRule(members=("json",), json_field="alt"),
        "stages": [shout],
        "scaled_decode": False,
    }
    with pytest.raises(UserError, match="1 of 9 samples have no picture"):
        make_data(path, **options).check(1)
    data = make_data(path, val_shards=path, on_damage="skip", max_bad_fraction=0.5, **options)
    data.check(1)
    data.setup("fit")
    (batch,) = itertools.islice(data.train_dataloader(), 1)
    texts = ["".join(map(chr, row)).rstrip("\0") for row in batch.texts.tolist()]
    assert sorted(texts) == [f"NUMBER {i}" for i in range(8)]
    assert batch.images.dtype == torch.uint8
    normal = data.on_after_batch_transfer(batch, 0).images
    assert normal.dtype == torch.float32
    assert normal.min() < 0
    (batch,) = data.val_dataloader()
    assert int(batch.valid.sum()) == 8


def test_gradient_accumulation_is_refused(shards, tmp_path):
    text = (
        r"accumulate_grad_batches \(2\) must be 1: accumulation changes a contrastive loss.* set "
    )
    text += r"model\.micro_batch_size"
    with pytest.raises(UserError, match=text):
        run_to(1, make_data(shards), tmp_path, accumulate_grad_batches=2)
    callbacks = [GradientAccumulationScheduler({0: 2})]
    with pytest.raises(UserError, match=r"\(scheduled\) must be 1"):
        run_to(1, make_data(shards), tmp_path, callbacks=callbacks)


def test_missing_inputs_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="inputs"):
        run_to(1, make_data(shards, inputs=None), tmp_path)


def test_fit_without_training_shards_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match=r"train_shards \(null\)"):
        run_to(1, make_data(None, val_shards=shards), tmp_path)


def test_loaders_work_in_a_plain_script(shards):
    data = make_data(shards, val_shards=shards)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.sample_ids.tolist() == epoch_order(3, 0, UNEVEN, 2)[:8].tolist()
    assert sum(len(batch.valid) for batch in data.val_dataloader()) == 37


def test_state_given_before_setup_is_kept(shards):
    first = make_data(shards)
    first.setup("fit")
    first.progress.samples_consumed = 16
    second = make_data(shards)
    second.load_state_dict(first.state_dict())
    second.setup("fit")
    assert second.progress.samples_consumed == 16


def test_check_passes_and_leaves_side_cars(tmp_path):
    shards = write_shards(tmp_path)
    make_data(shards, val_shards=shards[0]).check(world_size=4)
    assert all(os.path.exists(f"{shard}.idx.npz") for shard in shards)


def test_check_finds_what_is_wrong_before_any_rank_starts(shards, tmp_path):
    Path(tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:3000])
    for options, world_size, message in (
        ({"global_batch_size": 10}, 4, r"\(10\) must be divisible by .* \(4\); use 8 or 12"),
        ({"global_batch_size": 40}, 1, r"\(40\) must be at most .* \(37\)"),
        ({"shards": None}, 1, "both null"),
        ({"shards": "nowhere.tar"}, 1, r"train_shards .* missing file 'nowhere\.tar'"),
        ({"val_shards": str(tmp_path / "empty")}, 1, r"without \.tar or \.parquet files"),
        ({"val_shards": str(cut)}, 1, r"cut\.tar' is cut short"),
        ({"image_extensions": ("jpg",)}, 1, "have no picture"),
    ):
        with pytest.raises(UserError, match=message) as info:
            make_data(**{"shards": shards, **options}).check(world_size)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("global_batch_size", 0),
        ("val_local_batch_size", 0),
        ("workers_per_rank", -1),
        ("prefetch_factor", 0),
        ("seed", -1),
        ("block_shards", 0),
        ("max_image_pixels", 0),
        ("max_bad_fraction", 1.5),
        ("train_crop_scale", (0.0, 1.0)),
        ("train_crop_scale", (0.9, 0.5)),
    ],
)
def test_values_out_of_range_are_named(shards, option, value):
    with pytest.raises(UserError, match=rf"^{option} \("):
        make_data(shards, **{option: value})


def test_a_misspelt_field_of_captions_ends_a_run_before_its_first_step(tmp_path):
    shards = write_shards(tmp_path)
    rule = CaptionRule(members=("txt", "json"), weights={"txt": 1.0, "sythetic": 1.0})
    data = ImageTextDataModule(
        shards, inputs=tiny_inputs(), global_batch_size=4, workers_per_rank=0, captions=rule
    )
    data.setup("fit")
    words = "none of the next 64 training samples has field 'sythetic'"
    with pytest.raises(UserError, match=words):
        data.train_dataloader()


def test_a_misspelt_field_of_regions_ends_a_run_before_its_first_step(tmp_path):
    region = {"text": "a spot", "box": [0.0, 0.0, 0.5, 0.5], "score": 0.2}
    record = json.dumps({"spots": [region]}).encode()
    parts = {"png": encode(picture(0)), "txt": b"a", "json": record}
    shard = str(write_shard(tmp_path / "0.tar", [(f"{number}", parts) for number in range(8)]))
    for rule in (RegionRule(json_field="sopts"), RegionRule(json_field="spots")):
        data = make_data([shard], global_batch_size=4, regions=rule)
        data.setup("fit")
        words = rf"json_field \({rule.json_field}\): none of the next 1024 training samples"
        with pytest.raises(UserError, match=words):
            data.train_dataloader()
    data = make_data([shard], regions=RegionRule(json_field="spots", min_score=0.1))
    data.setup("fit")
    assert next(iter(data.train_dataloader())) is not None
