"""Reinforced shards through the data module: settings, loader processes, a run that goes on."""

import pytest
import torch

from dist_siglip.cli import main
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.errors import UserError
from tests.support.reinforced import DIMS, write_reinforced
from tests.support.shards import write_shards
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
