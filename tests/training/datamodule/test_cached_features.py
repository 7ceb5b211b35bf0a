"""A locked tower whose features were written down trains the other as the live one does."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.samples.cached_features import FeatureFile, write_features
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.stages import ColorJitter, RandAugment, RandomAffine, RandomFlip
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.models.tuning import LoraSettings, TowerConfig
from dist_siglip.training.module.locked_features import check_features, settle_identities
from tests.support.feature_ranks import data_of, module_of, run, run_rank
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.shards import caption, encode, picture, write_shard
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.training.datamodule.test_datamodule import pytestmark  # noqa: F401 - its warnings are ours

BAD = 11  # the sample whose picture is damaged


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, paths, first = tmp_path_factory.mktemp("shards"), [], 0
    for number, count in enumerate((7, 9, 4)):
        ids = range(first, first + count)
        pictures = [b"no picture" if i == BAD else encode(picture(i)) for i in ids]
        members = [
            (f"{i:06d}", {"png": data, "txt": caption(i).encode()})
            for i, data in zip(ids, pictures, strict=True)
        ]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", members)))
        first += count
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


@pytest.fixture(scope="module")
def features(shards, model, tmp_path_factory):
    """Features of each tower, written as ``embed`` writes them."""
    return {
        tower: embed(shards, model, tmp_path_factory.mktemp(tower), tower=tower)
        for tower in ("image", "text")
    }


def embed(shards, model, folder, tower="image", **settings):
    table = build_pair_table(shards, image_extensions=("png",))
    defaults = {"towers": tower, "format": "features", "dtype": "float32", "workers": 0}
    defaults |= {"local_batch_size": 5, "max_bad_fraction": 0.5}
    embed_shards(table, module_of(model, tower).built, folder, EmbedSettings(**defaults | settings))
    return str(folder)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_losses_and_parameters_are_those_of_the_live_tower(
    shards, model, features, tmp_path, tower, workers
):
    """The bad sample included: where it is due, the same substitute stands in."""
    live = run(model, shards, tmp_path, tower)
    data = {"train_features": features[tower], "workers_per_rank": workers}
    cached = run(model, shards, tmp_path, tower, data=data)
    assert cached["losses"] == pytest.approx(live["losses"], rel=1e-6)
    assert worst_error(cached["state"], live["state"], live["start"]) < 1e-4
    assert all(BAD not in ids for ids in live["ids"])
    unread, read = ("pixels", "tokens") if tower == "image" else ("tokens", "pixels")
    assert (cached[unread], cached[read]) == (0, live[read])
    if tower == "image":  # a text has no bad sample: its features are there
        assert cached["ids"] == live["ids"]


def test_micro_batches_of_the_other_tower_give_the_same(shards, model, features, tmp_path):
    live = run(model, shards, tmp_path)
    data = {"train_features": features["image"]}
    cached = run(model, shards, tmp_path, data=data, micro_batch_size=3)
    assert cached["losses"] == pytest.approx(live["losses"], rel=1e-5)
    assert worst_error(cached["state"], live["state"], live["start"]) < 1e-4


@pytest.mark.e2e
def test_two_ranks_train_from_features_as_one_process_does_live(shards, model, features, tmp_path):
    live = run(model, shards, tmp_path)
    data = {"train_features": features["image"]}
    arguments = (model, shards, str(tmp_path), "image", data)
    for found in run_ranks(run_rank, 2, *arguments):
        assert found["losses"] == pytest.approx(live["losses"], rel=1e-5)
        assert worst_error(found["state"], live["state"], live["start"]) < 1e-4


def test_features_of_several_folders_serve_one_training_set(shards, model, features, tmp_path):
    folders = [embed(part, model, tmp_path / part[0][-5:-4]) for part in (shards[:1], shards[1:])]
    whole = run(model, shards, tmp_path, data={"train_features": features["image"]})
    parts = run(model, shards, tmp_path, data={"train_features": folders})
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def test_a_file_has_a_row_for_every_sound_sample(shards, features):
    files = sorted(Path(features["image"]).glob("features/*.safetensors"))
    found = [FeatureFile(file) for file in files]
    assert [file.num_samples for file in found] == [7, 9, 4]
    assert [file.num_rows for file in found] == [7, 8, 4]
    assert found[1].row(BAD - 7, "image") is None
    assert found[1].row(0, "image").norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        ({"image_tower": TowerConfig()}, {}, r"image tower, which trains \(towers.clip|clip"),
        (
            {"image_tower": TowerConfig(lora=LoraSettings(rank=2))},
            {},
            r"set image_tower.locked: true without unlocked_groups or lora",
        ),
        ({"context_length": 6}, None, ""),
        ({"image_size": 48}, {}, r"not those of this image tower"),
        ({}, {"train_crop_scale": (0.5, 1.0)}, r"train_crop_scale \(\(0.5, 1.0\)\) has no effect"),
        ({}, {"stages": [iter]}, r"stages \(iter\) may change samples"),
        ({}, {"stages": [RandomFlip()]}, r"stages \(RandomFlip\) may change samples"),
        ({}, {"train_features": "nowhere"}, r"train_features \(nowhere\) is no folder"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    shards, model, features, tmp_path, module, data, message
):
    options = {"train_features": features["image"], **(data or {})}
    if data is None:  # the length of texts is nothing to the image tower
        assert run(model, shards, tmp_path, data=options, **module)["losses"]
        return
    with pytest.raises(UserError, match=message) as caught:
        run(model, shards, tmp_path, data=options, **module)
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused(shards, model, features, tmp_path):
    module = module_of(model)
    with torch.no_grad():
        module.towers.clip.visual.trunk.pos_embed[0, 0, 0] += 1
    data = data_of(shards, module, train_features=features["image"])
    data.check(1)
    with pytest.raises(UserError, match="other weights"):
        check_features(data, module.built, module.towers)


def test_a_shard_that_changed_has_no_features(shards, model, tmp_path):
    changed = [*shards[:2], shards[2].replace("00002", "00003")]
    members = [("x", {"png": encode(picture(1)), "txt": b"a"})]
    write_shard(Path(changed[2]), members)
    folder = embed(shards, model, tmp_path / "f")
    data = data_of(changed, module_of(model), train_features=folder)
    with pytest.raises(UserError, match=r"lack shard 00003.tar.*run dist-siglip embed"):
        data.check(1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (CaptionRule(pick="random"), r"captions.pick \(random\) must be first"),
        (CaptionRule(weights={"txt": 1.0}), r"captions.weights \(txt\) must be null"),
        (CaptionRule(probabilities={"txt": 1.0}), r"captions.probabilities \(txt\) must be null"),
        (CaptionRule(split_lines=True), r"captions.split_lines \(True\) is not what"),
    ],
)
def test_features_of_other_captions_are_refused(shards, model, features, rule, message):
    data = data_of(shards, module_of(model, "text"), train_features=features["text"], captions=rule)
    with pytest.raises(UserError, match=message):
        data.check(1)


def test_features_of_one_of_several_fields_are_refused(shards, model, tmp_path):
    folder = embed(shards, model, tmp_path, "text", captions=CaptionRule(weights={"txt": 1.0}))
    data = data_of(shards, module_of(model, "text"), train_features=folder)
    with pytest.raises(UserError, match="were made with captions of txt; embed again without"):
        data.check(1)


def test_features_in_half_precision_are_near(shards, model, tmp_path):
    live = run(model, shards, tmp_path)
    folder = embed(shards, model, tmp_path / "half", dtype="float16")
    cached = run(model, shards, tmp_path, data={"train_features": folder})
    assert cached["losses"] == pytest.approx(live["losses"], rel=1e-3)
    assert not np.array_equal(cached["losses"], live["losses"])


def test_a_damaged_file_makes_bad_samples_and_runs_no_code(shards, model, features, tmp_path):
    folder = embed(shards, model, tmp_path / "f")
    for number, path in enumerate(sorted(Path(folder).glob("features/*.safetensors"))):
        content = path.read_bytes()
        path.write_bytes([content[:50], b"", content[:-4000]][number])
    with pytest.raises(UserError, match=r"substitutes are all bad"):
        run(model, shards, tmp_path, data={"train_features": folder, "max_bad_fraction": 1.0})


def first_batch(shards, model, folder, tower):
    module = module_of(model, tower)
    data = data_of(shards, module, train_features=folder)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_augmented_pictures_train_beside_stored_texts(shards, model, features, tmp_path):
    """As beside the live tower, in loader processes too; the pixels are not those of whole ones."""
    flips = {"stages": [RandomFlip(0.5, spares=None), ColorJitter()]}
    live = run(model, shards, tmp_path, "text", data=flips)
    stored = {"train_features": features["text"], **flips}
    for workers in (0, 2):
        found = run(model, shards, tmp_path, "text", data={**stored, "workers_per_rank": workers})
        assert found["losses"] == pytest.approx(live["losses"], rel=1e-6)
        assert worst_error(found["state"], live["state"], live["start"]) < 1e-4
        assert (found["ids"], found["tokens"]) == (live["ids"], 0)
    plain = run(model, shards, tmp_path, "text", data={"train_features": features["text"]})
    assert plain["ids"] == live["ids"]
    assert plain["losses"] != pytest.approx(live["losses"], rel=1e-3)


def test_a_run_that_goes_on_augments_alike_beside_stored_texts(shards, model, features):
    """Rows, order and identities are those without stages, pixels are not."""
    stages = [RandomFlip(), ColorJitter(probability=1.0), RandomAffine(9, 0.1), RandAugment()]

    def batches(stages, first=0, last=3):
        options = {"train_features": features["text"], "stages": stages}
        data = data_of(shards, module_of(model, "text"), **options)
        data.setup("fit")
        data.progress.samples_consumed = 8 * first
        return list(itertools.islice(data.train_dataloader(), last - first))

    plain, changed = batches([]), batches(stages)
    for one, other in zip(plain, changed, strict=True):
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        assert torch.equal(one.text_features, other.text_features)
        assert torch.equal(one.picture_ids, other.picture_ids)
        assert torch.equal(one.caption_ids, other.caption_ids)
        assert not torch.equal(one.images, other.images)
    for one, other in zip(changed[1:], batches(stages, first=1), strict=True):
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.text_features, other.text_features)


def test_a_stage_that_may_change_texts_is_refused_beside_theirs(shards, model, features):
    data = {"train_features": features["text"], "stages": [RandomFlip(), lower]}
    with pytest.raises(UserError, match=r"stages \(lower\) may change .*leaves_texts") as caught:
        data_of(shards, module_of(model, "text"), **data).check(1)
    assert "\n" not in str(caught.value)


def lower(samples):
    for sample in samples:
        yield {**sample, "text": sample["text"].lower()}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_stored_ids_are_those_of_the_live_data(shards, model, features, tower):
    cached, live = (first_batch(shards, model, f, tower) for f in (features[tower], None))
    assert cached.sample_ids.tolist() == live.sample_ids.tolist()
    assert cached.picture_ids.tolist() == live.picture_ids.tolist()
    assert cached.caption_ids.tolist() == live.caption_ids.tolist()
    assert not set(live.picture_ids.tolist()) & set(live.sample_ids.tolist())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_files_of_before_ids_are_read_and_a_loss_that_asks_for_ids_says_so(
    shards, model, features, tmp_path, tower, caplog
):
    folder = tmp_path / "old"
    shutil.copytree(features[tower], folder)
    manifest = json.loads((folder / "embed.json").read_text())
    del manifest["ids"]
    (folder / "embed.json").write_text(json.dumps(manifest))
    for path in folder.glob("features/*.safetensors"):
        tensors = {name: t for name, t in load_file(path).items() if not name.endswith("_ids")}
        save_file(tensors, path)
    batch = first_batch(shards, model, str(folder), tower)
    assert len(batch.caption_ids.unique()) == len(batch.sample_ids.unique())
    assert (batch.picture_ids.tolist() == batch.sample_ids.tolist()) == (tower == "image")
    data = data_of(shards, module_of(model, tower), train_features=str(folder))
    data.setup("fit")
    settle_identities(data, are_used=False)
    assert data.train_dataset.picture_id is None
    assert "embed the shards again" not in caplog.text
    settle_identities(data, are_used=True)
    assert "embed the shards again" in caplog.text


def test_rows_that_point_past_the_end_are_damage(tmp_path):
    features = {"image": np.ones((2, 4), dtype=np.float32)}
    write_features(tmp_path / "a.safetensors", features, np.array([0, 2, -1], dtype=np.int32))
    with pytest.raises(OSError, match="is damaged"):
        FeatureFile(tmp_path / "a.safetensors")
