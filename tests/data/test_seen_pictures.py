"""Transparent, turned and cut pictures on their way through data sets, packing and inspection."""

import io
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_siglip.cli import main
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.packing import SampleMaker
from dist_siglip.data.packing.table import Row
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import evaluation_transform, training_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings
from dist_siglip.evaluation.samples import ShardDataset
from dist_siglip.models.build import tower_fingerprint
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.embedding import build_tiny
from tests.support.hostile import saved
from tests.support.pngs import RGBA, halves, png_of
from tests.support.shards import caption, jpeg, photo, tiny_inputs, write_shard

HIDDEN_RED = png_of(RGBA, 8, halves((255, 0, 0, 0), (0, 0, 255, 255)))


def turned_jpeg(size=(40, 20)):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(photo(*size), exif=exif)


def cut_jpeg():
    return jpeg(photo(160, 120))[:-2]


PICTURES = {"png": HIDDEN_RED, "turned.jpg": turned_jpeg(), "cut.jpg": cut_jpeg()}


@pytest.fixture
def shard(tmp_path):
    """A transparent, a turned and a cut picture."""
    members = [
        (f"{i:06d}", {kind.rsplit(".", maxsplit=1)[-1]: data, "txt": caption(i).encode()})
        for i, (kind, data) in enumerate(PICTURES.items())
    ]
    return str(write_shard(tmp_path / "0.tar", members))


def dataset(shard, stages=(), crop=None, **policy):
    table = build_pair_table([shard], image_extensions=("jpg", "png"))
    transform = training_transform(tiny_inputs(), crop)
    log = f"{shard}.bad.jsonl"
    pictures = PicturePolicy(**policy)
    return PairDataset(
        table, transform, seed=0, pictures=pictures, stages=stages, bad_sample_log=log
    )


@pytest.mark.parametrize("crop", [None, (0.9, 1.0)])
@pytest.mark.parametrize(
    ("transparency", "left"),
    [("#ffffff", (255, 255, 255)), ("#102030", (16, 32, 48)), ("drop", (255, 0, 0))],
)
def test_training_and_evaluation_see_the_ground_of_the_policy(shard, transparency, left, crop):
    image = dataset(shard, crop=crop, transparency=transparency)[StreamPosition(0, 0, 0)].image
    assert tuple(image[:, 8, 0].tolist()) == left
    assert image[:, 8, 15].tolist() == [0, 0, 255]


def test_embedding_sees_what_an_evaluation_sees(shard):
    for transparency in ("#102030", "drop"):
        data = dataset(shard, transparency=transparency)
        embedded = ShardDataset(
            data.table,
            evaluation_transform(tiny_inputs()),
            captions=EmbedSettings().captions,
            pictures=PicturePolicy(transparency=transparency),
        )
        assert torch.equal(
            embedded[StreamPosition(0, 0, 0)].image, data[StreamPosition(0, 0, 0)].image
        )


def test_embedding_follows_the_run_unless_it_is_told_otherwise():
    of_run = PicturePolicy(
        transparency="drop",
        exif_orientation="apply",
        truncated_pictures="use",
        formats=("png", "tiff"),
        intensity_window=(0, 4095),
    )
    assert EmbedSettings().pictures(of_run) == of_run
    told = EmbedSettings(formats=("jpeg", "png", "webp"), intensity_window=None)
    of_run = told.pictures(of_run)
    assert (of_run.formats, of_run.intensity_window) == (PicturePolicy().formats, None)
    changed = EmbedSettings(transparency="white", truncated_pictures="replace").pictures(of_run)
    assert changed == PicturePolicy(exif_orientation="apply")
    with pytest.raises(UserError, match=r"transparency \(whit\)"):
        EmbedSettings(transparency="whit")


def test_a_digest_knows_what_was_seen(tmp_path):
    built = build_tiny(tmp_path)
    grounds = ("white", "drop", "red")
    models = [replace(built, pictures=PicturePolicy(transparency=ground)) for ground in grounds]
    assert len({tower_fingerprint(model, "image") for model in models}) == 3
    windows = (None, (0, 65535), (0, 4095))
    models += [replace(built, pictures=PicturePolicy(intensity_window=each)) for each in windows]
    assert len({tower_fingerprint(model, "image") for model in models}) == 5
    assert len({tower_fingerprint(model, "text") for model in models}) == 1


def test_training_evaluation_and_report_see_16_bits_alike(tmp_path):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 10
    parts = {"tif": saved(Image.fromarray(values), "TIFF"), "txt": b"an X-ray"}
    shard = str(write_shard(tmp_path / "a.tar", [("k", parts)]))
    data = ImageTextDataModule(
        val_shards=shard,
        inputs=tiny_inputs(),
        formats=("png", "tiff"),
        intensity_window=(0, 4000),
    )
    table, policy = data.tables.of("val_shards"), data.pictures
    transform = evaluation_transform(tiny_inputs())
    seen = data.dataset_of("val_shards", transform)[StreamPosition(0, 0, 0)].image
    wanted = np.rint(255 * (values / 4000)).astype(np.uint8)
    assert torch.equal(seen, transform(Image.fromarray(wanted).convert("RGB")))
    embedded = ShardDataset(
        table, transform, captions=CaptionRule(), pictures=policy, tokenizer=None
    )
    assert torch.equal(embedded[StreamPosition(0, 0, 0)].image, seen)
    shown, media = data.dataset_of("val_shards", transform).shown(parts["tif"])
    assert media == "image/jpeg"
    with Image.open(io.BytesIO(shown)) as opened:
        assert np.abs(np.asarray(opened)[:, :, 0].astype(int) - wanted).max() < 20
    with pytest.raises(UserError, match="have no picture"):
        ImageTextDataModule(val_shards=shard).tables.of("val_shards")


class TakesAlpha:
    picture_mode = "RGBA"

    def __call__(self, samples):
        for fields in samples:
            assert fields["image"].mode == "RGBA"
            ground = Image.new("RGBA", fields["image"].size, "green")
            yield {**fields, "image": Image.alpha_composite(ground, fields["image"])}


def test_a_stage_can_lay_pictures_on_a_ground_of_its_own(shard):
    image = dataset(shard, stages=[TakesAlpha()])[StreamPosition(0, 0, 0)].image
    assert image[:, 8, 0].tolist() == [0, 128, 0]


def test_a_turned_picture_is_upright_on_request(shard):
    plain, upright = (
        dataset(shard, exif_orientation=choice)[StreamPosition(0, 0, 1)].image
        for choice in ("ignore", "apply")
    )
    # Nearly so: the sides are resized by different factors.
    assert (plain.rot90(-1, (1, 2)).float() - upright.float()).abs().mean() < 12
    assert (plain.float() - upright.float()).abs().mean() > 12


def test_a_cut_picture_is_used_counted_and_no_bad_sample(shard, caplog):
    data = dataset(shard, truncated_pictures="use")
    with caplog.at_level(logging.WARNING):
        samples = [data[StreamPosition(0, place, 2)] for place in range(2)]
    assert not any(sample.is_substitute for sample in samples)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "truncated picture 2 in this process" in said[1]
    assert "000002" in said[1]
    assert dataset(shard)[StreamPosition(0, 0, 2)].is_substitute


@pytest.mark.parametrize("policy", [{}, {"transparency": "drop"}, {"exif_orientation": "apply"}])
def test_the_gallery_shows_what_the_model_sees(shard, policy):
    data = dataset(shard, **policy, truncated_pictures="use")
    for kind, stored in PICTURES.items():
        shown, media_type = data.shown(stored)
        seen = EncodedPicture(stored, PicturePolicy(truncated_pictures="use", **policy)).decode()
        with Image.open(io.BytesIO(shown)) as image:
            assert not image.has_transparency_data
            assert image.getexif().get(0x0112, 1) == 1
            assert image.get_format_mimetype() == media_type
            if kind == "png":
                assert np.array_equal(np.asarray(image), np.asarray(seen))
            assert image.size == seen.size
    plain = jpeg(photo(30, 20))
    assert dataset(shard).shown(plain) == (plain, "image/jpeg")


def packed(tmp_path, data, **options):
    (tmp_path / "p").write_bytes(data)
    row = Row(number=0, picture="p", captions=("a",), caption_path=None, others={}, problem=None)
    return SampleMaker(images=str(tmp_path), **options)(row)


def test_pack_makes_turned_pictures_upright_on_request(tmp_path):
    kept = packed(tmp_path, turned_jpeg())
    assert kept["jpg"] == turned_jpeg()
    upright = packed(tmp_path, turned_jpeg(), pictures=PicturePolicy(exif_orientation="apply"))
    with Image.open(io.BytesIO(upright["jpg"])) as image:
        assert image.size == (20, 40)
        assert 0x0112 not in image.getexif()
    small = packed(
        tmp_path,
        turned_jpeg((80, 40)),
        resize_short_side=20,
        pictures=PicturePolicy(exif_orientation="apply"),
    )
    assert EncodedPicture(small["jpg"], PicturePolicy()).size == (20, 40)


@pytest.mark.parametrize(("transparency", "left"), [("#ffffff", 255), ("drop", 0)])
def test_pack_lays_pictures_that_it_makes_smaller_on_the_ground(tmp_path, transparency, left):
    large = np.repeat(np.repeat(halves((255, 0, 0, 0), (0, 0, 255, 255)), 8, 0), 8, 1)
    sample = packed(
        tmp_path,
        png_of(RGBA, 8, large),
        resize_short_side=32,
        pictures=PicturePolicy(transparency=transparency),
    )
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        assert abs(image.getpixel((2, 16))[1] - left) < 12
    small = packed(tmp_path, HIDDEN_RED, resize_short_side=32)
    assert small["png"] == HIDDEN_RED


def test_check_and_stats_count_what_is_transparent_or_cut(shard, capsys):
    assert main(["data", "check", shard, "--workers=1", "--json=true"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings == {"bad picture": 1, "transparent picture": 1}
    options = ["--workers=1", "--json=true", "--truncated_pictures=use"]
    assert main(["data", "check", shard, *options]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings == {"truncated picture": 1, "transparent picture": 1}
    assert main(["data", "stats", shard, "--workers=1", "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["transparent"] == 1
