"""Reinforced shards through the data module: settings, loader processes, a run that goes on."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from dist_siglip.cli import main
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.errors import UserError
from dist_siglip.training.module.captions import caption_weights_of
from dist_siglip.training.module.teachers import TeacherConfig
from tests.support.processes import run_ranks
from tests.support.reinforced import (
    DIMS,
    SCALES,
    reinforced_data,
    student_of,
    train,
    train_rank,
    write_reinforced,
)
from tests.support.sharded_ranks import worst_error
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import weights_beside
from tests.training.datamodule.test_datamodule import (
    Recorder,
    make_data,
    make_trainer,
    pytestmark,  # noqa: F401 - its warnings are ours
)

SETTINGS = DataCompDR(dims=DIMS, picture_size=16)


class RowRecorder(Recorder):
    """Writes down what belongs to the teachers, too."""

    def training_step(self, batch, batch_idx):
        rows = batch.teacher_image_features, batch.teacher_text_features, batch.texts
        self.batches.append([batch.sample_ids, batch.images, *rows])
        return self.weight.square().sum()


def data_of(shards, **options):
    settings = {"datacompdr": SETTINGS, "train_crop_scale": None, "global_batch_size": 4}
    return make_data(shards, **settings | options)


def run_to(step, folder, shards, checkpoint=None, **options):
    module, trainer = RowRecorder(), make_trainer(folder, max_steps=step)
    trainer.fit(module, datamodule=data_of(shards, **options), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{step}.ckpt")
    return module.batches


def test_loader_processes_and_a_resume_give_the_same_rows(tmp_path):
    shards = write_reinforced(tmp_path / "shards")
    whole = run_to(7, tmp_path, shards)  # three steps an epoch
    assert whole[0][2].shape == whole[0][3].shape == (4, 5)
    parts = run_to(4, tmp_path, shards, workers_per_rank=2)
    parts += run_to(7, tmp_path, shards, tmp_path / "4.ckpt")
    for ours, theirs in zip(parts, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [iter]}, r"stages \(1\) change samples whose rows datacompdr has"),
        ({"train_crop_scale": (0.9, 1.0)}, r"train_crop_scale .* has no effect on datacompdr"),
        ({"train_features": "rows"}, r"train_features \(rows\) stand in"),
        ({"captions": CaptionRule(pick="random")}, r"captions.pick \(random\) must be first"),
        (
            {"captions": CaptionRule(weights={"txt": 1.0})},
            r"captions.weights .* \(txt\) must be null",
        ),
        ({"datacompdr": DataCompDR(dims=())}, r"datacompdr.dims \(\[\]\) must be"),
        ({"datacompdr": DataCompDR(synthetic_share=1.5)}, r"synthetic_share \(1.5\) must be in"),
        ({"datacompdr": DataCompDR(synthetic="all")}, r"synthetic \(all\) must be drawn or beside"),
        ({"datacompdr": DataCompDR(picture_size=0)}, r"picture_size \(0\) must be at least 1"),
    ],
)
def test_settings_that_contradict_it_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        data_of("nowhere", **options)


def test_shards_are_looked_at_before_ranks_start(tmp_path):
    plain = write_shards(tmp_path / "plain")
    with pytest.raises(UserError, match=r"37 of 37 training samples have no \.paug\.json"):
        data_of(plain).check(1)
    data_of(write_reinforced(tmp_path / "reinforced")).check(1)


def test_numbers_of_the_command_line_have_ranges(capsys):
    words = ["fit", "--model.model=ViT-B-16", "--data.datacompdr.dims=[768]"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--print_config"])
    assert "picture_size: 224" in capsys.readouterr().out
    assert main([*words, "--data.datacompdr.synthetic_share=1.5"]) == 2
    assert "data.datacompdr.synthetic_share (1.5) must be in [0, 1]" in capsys.readouterr().err


def distillation_by_hand(u, v, batch, scale):
    """Cross-entropy with the mean of the teachers' softmaxes, both ways, in plain loops."""

    def softmax(logits):
        most = max(logits)
        parts = [math.exp(each - most) for each in logits]
        return [part / sum(parts) for part in parts]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    n, total = len(u), 0.0
    start = [0, DIMS[0], sum(DIMS)]
    images, texts = batch.teacher_image_features.tolist(), batch.teacher_text_features.tolist()
    for left, right, a, b in ((u, v, images, texts), (v, u, texts, images)):
        for i in range(n):
            wanted = [0.0] * n
            for k, factor in enumerate(SCALES):
                part = slice(start[k], start[k + 1])
                said = softmax([factor * dot(a[i][part], b[j][part]) for j in range(n)])
                wanted = [w + s / len(SCALES) for w, s in zip(wanted, said, strict=True)]
            shown = softmax([scale * dot(left[i], right[j]) for j in range(n)])
            total -= sum(w * math.log(s) for w, s in zip(wanted, shown, strict=True)) / (2 * n)
    return total


@pytest.mark.parametrize("synthetic", ["drawn", "beside"])
def test_the_loss_of_a_step_is_that_of_the_stored_rows(tmp_path, synthetic):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    module = student_of(model)
    settings = DataCompDR(dims=DIMS, picture_size=20, synthetic=synthetic)
    shards = write_reinforced(tmp_path / "shards")
    data = reinforced_data(shards, module, datacompdr=settings)
    losses = []
    trainer = make_trainer(tmp_path, max_steps=1, log_every_n_steps=1, callbacks=[LossOf(losses)])
    trainer.fit(module, datamodule=data)
    batch, u, v, scale, loss = losses[0]
    count = len(v) // len(u)
    assert count == (2 if synthetic == "beside" else 1)

    def mean_by_hand(rows):
        parts = zip(range(0, len(v), len(u)), rows.tensor_split(count, dim=1), strict=True)
        return (
            sum(
                distillation_by_hand(
                    u, v[first : first + len(u)], batch._replace(teacher_text_features=text), scale
                )
                for first, text in parts
            )
            / count
        )

    rows = batch.teacher_text_features
    assert loss == pytest.approx(mean_by_hand(rows), abs=1e-5)
    for wrong in (rows.roll(1, 0), *([rows.roll(sum(DIMS), 1)] if count == 2 else [])):
        assert loss != pytest.approx(mean_by_hand(wrong), abs=1e-3)


class LossOf(Callback):
    """Keeps batch, features before the step, scale, and the logged loss."""

    def __init__(self, found):
        self.found = found

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with torch.no_grad():
            u, v = module.towers(batch.images, batch.all_texts())
        self.before = batch, u.tolist(), v.tolist(), module.logits.log_scale.exp().item()

    def on_train_batch_end(self, trainer, *_):
        self.found.append((*self.before, trainer.callback_metrics["train/loss"].item()))


@pytest.mark.e2e
def test_two_ranks_learn_what_one_process_does(tmp_path):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    shards = write_reinforced(tmp_path / "shards")
    start = student_of(model).state_dict()
    alone = train(model, shards, tmp_path)
    for state in run_ranks(train_rank, 2, model, shards, str(tmp_path)):
        assert worst_error(state, alone, start) < 1e-4


def test_two_captions_are_refused_where_teachers_answer_to_one(tmp_path):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    beside = DataCompDR(dims=DIMS, synthetic="beside")
    data = reinforced_data("nowhere", student_of(model), datacompdr=beside)
    live = TeacherConfig(model=model, pretrained=weights_beside(model), scale=9.0)
    rows = [TeacherConfig(scale=scale) for scale in SCALES]
    module = student_of(model, teachers=[*rows, live])
    with pytest.raises(UserError, match=r"synthetic \(beside\): model.teachers that are live"):
        module.teachers.check_data(data)
    with pytest.raises(UserError, match=r"synthetic \(beside\): this module takes one caption"):
        caption_weights_of(data, None)


def test_teachers_of_other_numbers_than_the_rows_are_refused(tmp_path):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    module = student_of(model)
    shards = write_reinforced(tmp_path / "shards")
    data = reinforced_data(shards, module, datacompdr=DataCompDR(dims=(5,)))
    with pytest.raises(UserError, match=r"datacompdr.dims \(\[5\]\) are of 1 teachers, and 2"):
        module.teachers.check_data(data)
