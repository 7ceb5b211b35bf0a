"""Reinforced shards: the augmentation, caption and rows of a place belong together."""

import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.augmentations import (
    OPERATIONS,
    Replay,
    UnknownOperationError,
    apply_operation,
    parse_augmentation,
)
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.batch import PairCollator
from dist_siglip.data.samples.captions import EmptyCaptions
from dist_siglip.data.samples.datacompdr import (
    MEMBERS,
    DataCompDR,
    ReinforcedSamples,
    read_teacher_rows,
    teacher_row,
)
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import CropResize, evaluation_transform
from dist_siglip.errors import UserError
from tests.support.hostile import Payload
from tests.support.reinforced import (
    DIMS,
    NUM_AUGMENTATIONS,
    NUM_SYNTHETIC,
    augmentation,
    members,
    npz,
    row,
    synthetic,
    write_reinforced,
)
from tests.support.shards import caption, photo, picture, tiny_inputs, tokenize

ROWS = np.ones((2, 5), np.float32)


def dataset(shards, share=0.5, max_incomplete=0.0, synthetic_is="drawn", **options):
    table = build_pair_table(shards, image_extensions=("png",), other_extensions=MEMBERS)
    settings = DataCompDR(dims=DIMS, synthetic=synthetic_is, synthetic_share=share, picture_size=16)
    replay = Replay(CropResize(tiny_inputs(), scaled_decode=False), 16)
    reinforced = ReinforcedSamples(settings, table, replay, max_incomplete=max_incomplete)
    return PairDataset(
        table,
        evaluation_transform(tiny_inputs()),
        seed=5,
        pictures=PicturePolicy(),
        reinforced=reinforced,
        **options,
    )


def place(sample_id, position=0):
    return StreamPosition(0, position, sample_id)


def replayed_by_hand(image, stored, size=16):
    """Crop, resize and operations, as torchvision's own transforms make them."""
    (top, left, rows, columns), operations = stored
    seen = functional.resized_crop(
        image, top, left, rows, columns, [size, size], InterpolationMode.BICUBIC
    )
    for number, magnitude in operations or ():
        seen = _apply_op(seen, OPERATIONS[number], magnitude, InterpolationMode.NEAREST, None)
    return functional.pil_to_tensor(seen)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision_to_the_pixel(name):
    image = photo(40, 40)
    magnitudes, is_signed = RandAugment()._augmentation_space(31, (40, 40))[name]
    for magnitude in magnitudes.reshape(-1)[::3].tolist():
        for value in {magnitude, -magnitude if is_signed else magnitude}:
            theirs = _apply_op(image, name, value, InterpolationMode.NEAREST, None)
            ours = apply_operation(image, name, value, picture_size=40)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)), value


def test_the_operations_and_their_numbers_are_those_of_torchvision():
    assert tuple(RandAugment()._augmentation_space(31, (8, 8))) == OPERATIONS


def test_a_shift_is_a_share_of_the_picture():
    image = photo(40, 40)
    half = image.resize((20, 20), Image.Resampling.NEAREST)
    for name in ("TranslateX", "TranslateY"):
        moved = apply_operation(image, name, 8.0, picture_size=40)
        small = apply_operation(half, name, 8.0, picture_size=40)
        want = moved.resize((20, 20), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(small), np.asarray(want))


def test_a_flip_comes_after_the_crop_and_before_the_operations():
    stored = parse_augmentation([[2, 3, 9, 11], True, [[3, 4.0]]])
    ours = Replay(CropResize(tiny_inputs(), False), 16)(picture(1), stored)
    cropped = functional.resized_crop(picture(1), 2, 3, 9, 11, [16, 16], InterpolationMode.BICUBIC)
    want = _apply_op(functional.hflip(cropped), "TranslateX", 4.0, InterpolationMode.NEAREST, None)
    assert torch.equal(ours, functional.pil_to_tensor(want))


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ([[0, 0, 8], None], BadSampleError),
        ([[0, 0, 8, 8.5], None], BadSampleError),
        ([[0, 0, 8, True], None], BadSampleError),
        ([None, [0, 0, 8, 8], None], BadSampleError),
        ({"crop": 1}, BadSampleError),
        ([[0, 0, 8, 8], 7], BadSampleError),
        ([[0, 0, 8, 8], [[4]]], BadSampleError),
        ([[0, 0, 8, 8], [[4, "much"]]], BadSampleError),
        ([[0, 0, 8, 8], [["Posterize", -1]]], BadSampleError),
        ([[0, 0, 8, 8], [["Rotate", float("nan")]]], BadSampleError),
        ([[0, 0, 8, 10**400], None], BadSampleError),
        ([[0, 0, 8, 8], [[14, 0.0]]], UnknownOperationError),
        ([[0, 0, 8, 8], [[-1, 0.0]]], UnknownOperationError),
        ([[0, 0, 8, 8], [["Invert", 0.0]]], UnknownOperationError),
        ([[0, 0, 8, 8], None, [0.3, 1, 2, 3, 4]], UnknownOperationError),
    ],
)
def test_augmentations_of_another_form_are_told_apart(stored, problem):
    with pytest.raises(problem):
        parse_augmentation(stored)


def test_pixels_caption_and_rows_of_a_place_belong_together(tmp_path):
    data = dataset(write_reinforced(tmp_path))
    drawn = set()
    for position in range(150):
        sample_id = position % 12
        sample = data[place(sample_id, position)]
        images = [row(sample_id, "image", n) for n in range(NUM_AUGMENTATIONS)]
        texts = [row(sample_id, "text", n) for n in range(1 + NUM_SYNTHETIC)]
        (of_image,) = (
            n for n, r in enumerate(images) if np.allclose(sample.teacher_image_features, r)
        )
        (of_text,) = (
            n for n, r in enumerate(texts) if np.allclose(sample.teacher_text_features, r)
        )
        stored = augmentation(sample_id, of_image)
        assert torch.equal(sample.image, replayed_by_hand(picture(sample_id), stored))
        says = [caption(sample_id), *(synthetic(sample_id, n) for n in range(NUM_SYNTHETIC))]
        assert sample.caption == says[of_text]
        drawn.add((of_image, of_text))
    assert len(drawn) == NUM_AUGMENTATIONS * (1 + NUM_SYNTHETIC)  # each with each


def test_both_captions_come_with_the_rows_of_both(tmp_path):
    data = dataset(write_reinforced(tmp_path), synthetic_is="beside")
    drawn = set()
    for position in range(24):
        sample_id = position % 12
        sample = data[place(sample_id, position)]
        assert sample.caption == caption(sample_id)
        (other,) = sample.more_captions
        number = [synthetic(sample_id, n) for n in range(NUM_SYNTHETIC)].index(other)
        want = np.concatenate([row(sample_id, "text", 0), row(sample_id, "text", 1 + number)])
        assert np.allclose(sample.teacher_text_features, want, atol=1e-6)
        drawn.add(number)
    assert len(drawn) == NUM_SYNTHETIC


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_synthetic_captions_is_the_one_asked_for(tmp_path, share):
    data = dataset(write_reinforced(tmp_path, (2,)), share)
    shown = [data[place(0, position)].caption for position in range(400)]
    part = sum(text.startswith("synthetic") for text in shown) / 400
    assert abs(part - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-9


def test_batches_are_the_same_on_other_ranks_in_another_process_and_after_a_resume(tmp_path):
    data = dataset(write_reinforced(tmp_path))

    def batches(rank, world_size, consumed, stop, of=data):
        plan = BatchPlan(
            counts=of.table.counts,
            fingerprint=of.table.fingerprint,
            seed=5,
            global_batch_size=4,
            block_shards=2,
        )
        sampler = GlobalBatchSampler(
            plan, rank=rank, world_size=world_size, progress=Progress(samples_consumed=consumed)
        )
        found = [
            [of[at] for at in positions] for positions, _ in zip(sampler, range(stop), strict=False)
        ]
        return [PairCollator(tokenize)(samples) for samples in found]

    whole = batches(0, 1, 0, 4)
    assert whole[0].teacher_image_features.shape == (4, 5)
    assert whole[0].teacher_image_features.dtype == torch.float32
    elsewhere = pickle.loads(pickle.dumps(data))
    again = batches(0, 1, 8, 2, of=elsewhere)  # after two batches
    halves = [batches(rank, 2, 0, 4) for rank in range(2)]
    for number, batch in enumerate(whole):
        for field in ("images", "texts", "teacher_image_features", "teacher_text_features"):
            want = getattr(batch, field)
            parts = torch.cat([getattr(halves[rank][number], field) for rank in range(2)])
            order = torch.cat([halves[rank][number].sample_ids for rank in range(2)])
            assert torch.equal(order, batch.sample_ids)
            assert torch.equal(parts, want)
            if number >= 2:
                assert torch.equal(getattr(again[number - 2], field), want)
    # Another epoch draws anew.
    first, later = data[StreamPosition(0, 0, 3)], data[StreamPosition(1, 0, 3)]
    assert not torch.equal(first.image, later.image) or first.caption != later.caption


@pytest.mark.parametrize("bits", ["<f2", "<f4", ">f4", "bf16"])
def test_rows_of_every_kind_of_number_are_read_and_normalised(bits):
    values = np.stack([row(0, "image", n) for n in range(3)])
    if bits == "bf16":
        stored = torch.from_numpy(3 * values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    else:
        stored = (3 * values).astype(bits)
    for compressed in (False, True):
        rows = read_teacher_rows(npz(stored, stored[:1], compressed=compressed), 5)
        found = teacher_row(rows.image[2], DIMS)
        assert found.dtype == torch.float32
        assert found.split(DIMS)[0].norm().item() == pytest.approx(1, abs=1e-6)
        assert found.split(DIMS)[1].norm().item() == pytest.approx(1, abs=1e-6)
        assert np.allclose(found, values[2], atol=1e-6 if bits.endswith("f4") else 6e-3)


def header(shape, dtype="<f4", order="False"):
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(kind=zipfile.ZIP_STORED, **entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def objects(path):
    buffer = io.BytesIO()
    np.savez(buffer, image_emb=np.array([Payload(path)], object), text_emb=ROWS)
    return buffer.getvalue()


SOUND = header((2, 5)) + ROWS.tobytes()
HOSTILE = {
    "no archive": lambda path: b"\x80\x04K\x00.",
    "empty": lambda path: b"",
    "a pickle inside": objects,
    "no text rows": lambda path: archive(image_emb=SOUND),
    "cut short": lambda path: archive(image_emb=SOUND, text_emb=SOUND)[:-40],
    "a bit turned": lambda path: archive(image_emb=SOUND, text_emb=SOUND).replace(
        ROWS.tobytes(), ROWS.tobytes()[:-1] + b"\x40", 1
    ),
    "a bomb": lambda path: archive(
        zipfile.ZIP_DEFLATED, image_emb=header((1 << 22, 5)) + bytes(5 << 24), text_emb=SOUND
    ),
    "a claim of 2^60 rows": lambda path: archive(image_emb=header((1 << 60, 5)), text_emb=SOUND),
    "another compression": lambda path: archive(zipfile.ZIP_LZMA, image_emb=SOUND, text_emb=SOUND),
    "another width": lambda path: npz(np.ones((2, 6), np.float32), ROWS),
    "one dimension": lambda path: npz(np.ones(5, np.float32), ROWS),
    "three dimensions": lambda path: npz(np.ones((1, 2, 5), np.float32), ROWS),
    "no rows": lambda path: npz(np.ones((0, 5), np.float32), ROWS),
    "whole numbers": lambda path: npz(np.ones((2, 5), np.int64), ROWS),
    "columns first": lambda path: archive(
        image_emb=header((2, 5), order="True") + ROWS.tobytes(), text_emb=SOUND
    ),
    "a header that is code": lambda path: archive(
        image_emb=b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').getpid()".ljust(118),
        text_emb=SOUND,
    ),
    "another version": lambda path: archive(
        image_emb=SOUND.replace(b"NUMPY\x01", b"NUMPY\x09"), text_emb=SOUND
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_rows_are_bad_samples_and_run_nothing(kind, tmp_path):
    assert (
        read_teacher_rows(archive(image_emb=SOUND, text_emb=SOUND), 5).image.tolist()
        == ROWS.tolist()
    )
    with pytest.raises(BadSampleError):
        read_teacher_rows(HOSTILE[kind](tmp_path / "made"), 5)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_that_says_nothing_is_a_bad_sample(value):
    with pytest.raises(BadSampleError, match="zero or not finite"):
        teacher_row(np.array([1, 2, 3, value, value], np.float32), DIMS)


BAD = {
    "crop beside the picture": (
        {"param_aug": [[[0, 15, 8, 8], None]] * NUM_AUGMENTATIONS},
        r"columns 15 to 23 of a picture of 20 rows and 20 columns: the teachers saw it in another",
    ),
    # Whichever is drawn: the others say that this is not the picture that the teachers saw.
    "one crop of several beside the picture": (
        {"param_aug": [*[[[0, 0, 8, 8], None]] * 3, [[0, 0, 21, 8], None]]},
        "rows 0 to 21 and columns 0 to 8 of a picture of 20 rows",
    ),
    "crop before the picture": (
        {"param_aug": [[[-1, 0, 8, 8], None]] * NUM_AUGMENTATIONS},
        "which is no rectangle",
    ),
    "augmentations without rows": (
        {"param_aug": [[[0, 0, 8, 8], None]] * 9},
        "image_emb has 4 rows for 9 augmentations",
    ),
    "captions without rows": ({"syn_text": ["a"]}, "text_emb has 3 rows for a caption and 1 syn"),
    "no augmentation": ({"param_aug": []}, "no list of augmentations"),
    "empty captions": ({"syn_text": ["", " \n"]}, "synthetic captions are empty"),
    "captions that are none": ({"syn_text": [1, 2]}, "'syn_text' holds a int"),
    "JSON cut short": ({"paug_json": b'{"param_aug": "[[["}'}, "param_aug is not JSON"),
    "JSON nested too deeply": (
        {"paug_json": json.dumps({"param_aug": "[" * 100_000}).encode()},
        "param_aug is not JSON",
    ),
    "another field": ({"syn_json": b'{"text": []}'}, "no field 'syn_text'"),
    "rows of another width": (
        {"image_emb": np.ones((4, 6), np.float32)},
        r"image_emb has shape \(4, 6\), not rows of 5 numbers",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_sample_that_does_not_fit_together_is_replaced_and_named(kind, tmp_path, caplog):
    changed, reason = BAD[kind]
    data = dataset(write_reinforced(tmp_path, (6,), {4: changed}), share=1.0)
    caplog.clear()
    sample = data[place(4)]
    assert all(data[place(4, position)].is_substitute for position in range(8))
    assert sample.sample_id != 4
    assert "000004" in caplog.text
    assert re.search(reason, caplog.text)
    shown = [synthetic(sample.sample_id, n) for n in range(NUM_SYNTHETIC)]
    want = row(sample.sample_id, "text", 1 + shown.index(sample.caption))
    assert np.allclose(sample.teacher_text_features, want, atol=1e-6)


def test_shards_that_cannot_serve_are_refused_in_a_line(tmp_path):
    def refusal(name, bad, counts=(3,), **options):
        with pytest.raises(UserError) as caught:
            dataset(write_reinforced(tmp_path / name, counts, bad), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    said = refusal("a", {1: {"npz": None}})
    assert "1 of 3 training samples have no .npz, first" in said
    assert "000001" in said
    everywhere = {i: {"npz": None, "pth_gz": b"\x1f\x8b"} for i in range(3)}
    said = refusal("b", everywhere)
    assert ".pth.gz is a pickle, which may run code and is not read" in said
    assert "numpy.savez" in said
    said = refusal("c", {i: {"image_emb": np.ones((4, 7), np.float32)} for i in range(3)})
    assert "none of the first samples can be used" in said
    assert "(4, 7), not rows of 5 numbers; datacompdr.dims are [3, 2]" in said
    unknown = [[[0, 0, 8, 8], [[14, 0.0]]]] * NUM_AUGMENTATIONS
    said = refusal("d", {0: {"param_aug": unknown}})
    assert "augmentation asks for operation '14'" in said
    assert "Equalize can be replayed" in said
    assert "000000" in said
    # Behind the samples that are looked at first, it ends the run where it is met.
    late = dataset(write_reinforced(tmp_path / "e", (12,), {11: {"param_aug": unknown}}))
    with pytest.raises(UserError, match=r"000011.*operation '14'.*leave the shard out"):
        late[place(11)]
    # As far as it is allowed to skip, a sample without rows is a bad one.
    some = write_reinforced(tmp_path / "f", (10,), {9: {"npz": None}})
    assert dataset(some, max_incomplete=0.1)[place(9)].is_substitute
    with pytest.raises(UserError, match=r"1 of 10 training samples have no \.npz"):
        dataset(some, max_incomplete=0.09)


def test_members_are_those_of_the_layout():
    assert set(members(0)) == {"png", "txt", "url.txt", "json", *MEMBERS}
    assert EmptyCaptions()(members(0)["txt"].decode()) is False
