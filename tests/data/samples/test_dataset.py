import json
import os
import pickle
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from PIL import Image

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.identity import picture_id
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import evaluation_transform, training_transform
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule.named_fields import check_captions
from tests.support.shards import caption, encode, picture, tiny_inputs, write_shard, write_shards


def dataset(shards, crop=(0.3, 1.0), **options):
    table = build_pair_table([str(s) for s in shards], image_extensions=("jpg", "png"))
    settings = {"seed": 7, "pictures": PicturePolicy(max_image_pixels=10_000)} | options
    return PairDataset(table, training_transform(tiny_inputs(), crop), **settings)


def write_bad(folder, bad):
    """One shard of six samples, some of them replaced by bad members."""
    members = []
    for i in range(6):
        parts = {"png": encode(picture(i)), "txt": caption(i).encode()} | bad.get(i, {})
        members.append((f"key{i}", parts))
    return [write_shard(folder / "a.tar", members)]


def test_sample_of_a_slot_is_the_stored_pair(tmp_path):
    data = dataset(write_shards(tmp_path), crop=None)
    for i in (0, 7, 20, 36):
        sample = data[StreamPosition(0, 99, i)]
        assert torch.equal(sample.image, evaluation_transform(tiny_inputs())(picture(i)))
        assert (sample.caption, sample.sample_id) == (caption(i), i)
        assert (sample.is_valid, sample.is_substitute) == (True, False)
    assert len(data) == 37


def test_crop_is_a_function_of_seed_epoch_and_position(tmp_path):
    shards = write_shards(tmp_path)
    data = dataset(shards)
    reference = data[StreamPosition(2, 5, 9)].image
    assert torch.equal(reference, data[StreamPosition(2, 5, 9)].image)
    assert torch.equal(reference, pickle.loads(pickle.dumps(data))[StreamPosition(2, 5, 9)].image)
    for other in (
        data[StreamPosition(3, 5, 9)],
        data[StreamPosition(2, 6, 9)],
        dataset(shards, seed=8)[StreamPosition(2, 5, 9)],
    ):
        assert not torch.equal(reference, other.image)


def test_loading_leaves_the_generators_of_the_process_alone(tmp_path):
    data = dataset(write_shards(tmp_path))
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    data[StreamPosition(0, 0, 0)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == [random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"png": b"junk"}, "cannot be decoded"),
        ({"png": encode(picture(2, side=200))[:5000]}, "200 x 200 pixels, at most 10000"),
        ({"png": encode(picture(2))[:-100]}, "cannot be decoded"),
        ({"png": b""}, "cannot be decoded"),
        ({"txt": b""}, "caption is empty"),
        ({"txt": b"\xff\xfe"}, "caption is not UTF-8"),
    ],
)
def test_bad_sample_is_replaced_named_and_marked(tmp_path, caplog, parts, reason):
    shards = write_bad(tmp_path, {2: parts})
    data = dataset(shards)
    sample = data[StreamPosition(0, 4, 2)]
    assert sample.is_substitute
    assert sample.is_valid
    assert sample.sample_id != 2
    assert sample.caption == caption(sample.sample_id)
    assert f"{shards[0]}/key2" in caplog.text
    assert reason in caplog.text
    assert data[StreamPosition(0, 4, 2)].sample_id == sample.sample_id


def test_substitutes_differ_between_positions(tmp_path):
    data = dataset(write_bad(tmp_path, {2: {"png": b"junk"}}))
    assert {data[StreamPosition(0, place, 2)].sample_id for place in range(60)} == {0, 1, 3, 4, 5}


def test_evaluation_does_not_count_substitutes_or_padding(tmp_path):
    data = dataset(write_bad(tmp_path, {2: {"png": b"junk"}}), is_evaluation=True)
    assert not data[StreamPosition(0, 2, 2)].is_valid
    assert not data[StreamPosition(0, 6, 5, is_padding=True)].is_valid
    assert data[StreamPosition(0, 3, 3)].is_valid


def test_all_bad_ends_with_an_error(tmp_path):
    data = dataset(write_bad(tmp_path, {i: {"png": b"junk"} for i in range(6)}))
    with pytest.raises(UserError, match=r"a\.tar/key2' and 20 substitutes are all bad"):
        data[StreamPosition(0, 0, 2)]


def test_warnings_are_rate_limited(tmp_path, caplog):
    data = dataset(write_bad(tmp_path, {2: {"png": b"junk"}}))
    for place in range(250):
        data[StreamPosition(0, place, 2)]
    assert 20 < len(caplog.records) < 30


def test_shard_cut_while_the_run_goes_on_gives_bad_samples(tmp_path, caplog):
    shards = write_shards(tmp_path, (3, 3))
    data = dataset(shards)
    os.truncate(shards[1], 1000)
    sample = data[StreamPosition(0, 0, 5)]
    assert sample.sample_id < 3
    assert "bytes early" in caplog.text


def test_pickles_in_a_shard_are_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    bomb = pickle.dumps(Bomb())
    extra = dict.fromkeys(("pyd", "pkl", "pickle", "pth", "npy", "a.pyd", "png.pkl"), bomb)
    data = dataset(write_bad(tmp_path, {1: extra, 3: {"png": bomb}, 4: {"txt": bomb}}))
    samples = [data[StreamPosition(0, i, i)] for i in range(6)]
    assert [sample.is_substitute for sample in samples] == [False, False, False, True, True, False]
    assert not (tmp_path / "executed").exists()


def test_raw_returns_what_is_stored(tmp_path):
    jpeg = encode(picture(1), "JPEG")
    shard = write_shard(
        tmp_path / "a.tar",
        [("k", {"png": jpeg, "txt": b" a fox\n"}), ("l", {"png": b"junk", "txt": b"a hen"})],
    )
    data = dataset([shard])
    assert data.raw(0) == (jpeg, "image/jpeg", "a fox")
    with pytest.raises(BadSampleError):
        data.raw(1)


def test_programming_errors_in_a_transform_are_not_bad_samples(tmp_path):
    table = build_pair_table(write_shards(tmp_path), image_extensions=("png",))

    def broken(image: Image.Image) -> torch.Tensor:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        PairDataset(table, broken, seed=0, pictures=PicturePolicy(max_image_pixels=10_000))[
            StreamPosition(0, 0, 0)
        ]


def several(folder):
    members = [
        (
            f"key{i}",
            {
                "png": encode(picture(i)),
                "txt": f"a{i}\nb{i}".encode(),
                "json": b'{"caption": ["c%d", "d%d"], "width": 7}' % (i, i),
            },
        )
        for i in range(6)
    ]
    return [write_shard(folder / "a.tar", members)]


def captioned(shards, rule, **options):
    table = build_pair_table(
        [str(s) for s in shards], image_extensions=("png",), caption_extensions=rule.members
    )
    settings = {
        "seed": 7,
        "pictures": PicturePolicy(max_image_pixels=10_000),
        "captions": rule,
    } | options
    return PairDataset(table, training_transform(tiny_inputs(), None), **settings)


def test_one_of_several_captions_is_drawn_by_the_place(tmp_path):
    rule = CaptionRule(members=("txt", "json"), pick="random", split_lines=True)
    data = captioned(several(tmp_path), rule)
    seen = [data[StreamPosition(0, place, 3)].caption for place in range(200)]
    assert set(seen) == {"a3", "b3", "c3", "d3"}
    again = pickle.loads(pickle.dumps(data))
    assert seen == [again[StreamPosition(0, place, 3)].caption for place in range(200)]
    assert data.raw(3)[2] in {"a3", "b3", "c3", "d3"}


def test_the_draw_of_the_device_says_nothing_of_the_caption(tmp_path):
    rule = CaptionRule(members=("txt", "json"), pick="random", split_lines=True)
    data = captioned(several(tmp_path), rule)
    samples = [data[StreamPosition(0, place, 3)] for place in range(400)]
    # Two draws of one key would agree in all 400, those of two keys in a quarter.
    agree = sum("abcd"[sample.draw % 4] == sample.caption[0] for sample in samples)
    assert 50 <= agree <= 150


def test_an_evaluation_takes_the_first_caption(tmp_path):
    rule = CaptionRule(members=("json",), pick="random")
    data = captioned(several(tmp_path), rule, is_evaluation=True)
    assert {data[StreamPosition(0, place, 3)].caption for place in range(50)} == {"c3"}


def pictured(folder, name="a.tar"):
    """Six samples of three pictures; what their JSON says of them differs."""
    facts = (
        {"coco": {"id": 7}},
        {"coco": {"id": "7"}},
        {},
        {"coco": {"id": None}},
        {"coco": 3},
        {},
    )
    members = [
        (
            f"{i}",
            {"png": encode(picture(i % 3)), "txt": caption(i).encode()}
            | ({"json": json.dumps(fact).encode()} if fact or i == 2 else {}),
        )
        for i, fact in enumerate(facts)
    ]
    return [str(write_shard(folder / name, members))]


def ids_of(data):
    ids = [data[StreamPosition(0, 0, i)].picture_id for i in range(len(data))]
    return [ids.index(each) for each in ids]


def test_a_picture_is_its_bytes_whatever_the_crop(tmp_path):
    data = dataset(pictured(tmp_path), crop=(0.3, 0.5))
    assert ids_of(data) == [0, 1, 2, 0, 1, 2]
    assert data[StreamPosition(0, 0, 0)].picture_id == picture_id(encode(picture(0)))
    data.picture_id = None
    assert {data[StreamPosition(0, 0, i)].picture_id for i in range(6)} == {None}


def test_a_picture_is_what_a_field_says_or_its_bytes(tmp_path):
    shards = pictured(tmp_path)
    table = build_pair_table(shards, image_extensions=("png",), other_extensions=("json",))
    options = {"seed": 7, "pictures": PicturePolicy(), "picture_id": "coco.id"}
    data = PairDataset(table, training_transform(tiny_inputs(), None), **options)
    assert ids_of(data) == [0, 0, 2, 3, 4, 2]
    assert [data[StreamPosition(0, 0, i)].caption for i in (0, 5)] == [caption(0), caption(5)]
    assert (
        pickle.loads(pickle.dumps(data))[StreamPosition(0, 0, 1)].picture_id
        == data[StreamPosition(0, 0, 0)].picture_id
    )


def test_a_sample_with_a_json_alone_still_lacks_its_caption(tmp_path):
    members = [("0", {"png": encode(picture(0)), "json": b'{"id": 1}'})]
    shard = str(write_shard(tmp_path / "a.tar", members))
    with pytest.raises(UserError, match="have no caption"):
        build_pair_table([shard], image_extensions=("png",), other_extensions=("json",))


def test_a_caption_without_a_token_is_a_bad_sample(tmp_path, caplog):
    shards = write_bad(tmp_path, {2: {"txt": b"..."}, 3: {"txt": b"-"}, 4: {"txt": b"\0\0"}})
    tokenizer = SimpleTokenizer(clean="canonicalize")
    sample = dataset(shards, tokenizer=tokenizer)[StreamPosition(0, 0, 2)]
    assert sample.is_substitute
    assert sample.sample_id in {0, 1, 5}
    assert "key2': caption is empty" in caplog.text
    clip = dataset(shards, tokenizer=SimpleTokenizer())
    assert [clip[StreamPosition(0, 0, i)].is_substitute for i in (2, 3, 4)] == [False, False, True]


def test_stages_see_the_sample_and_draw_by_the_place(tmp_path):
    seen = []

    def look(samples):
        for sample in samples:
            seen.append(sample)
            yield {**sample, "text": f"{sample['text']} {random.random()}"}

    rule = CaptionRule(members=("json",))
    shards = several(tmp_path)
    data = captioned(shards, rule, stages=[look])
    first = data[StreamPosition(0, 5, 2)].caption
    assert first.startswith("c2 0.")
    assert data[StreamPosition(0, 5, 2)].caption == first
    assert data[StreamPosition(0, 6, 2)].caption != first
    assert seen[0]["__key__"] == "key2"
    assert seen[0]["__url__"] == str(shards[0])
    assert seen[0]["json"]["width"] == 7
    assert seen[0]["image"].size == (20, 20)


def test_samples_that_a_stage_leaves_out_are_replaced_but_not_bad(tmp_path, caplog):
    def even(samples):
        yield from (s for s in samples if int(s["__key__"][-1]) % 2 == 0)

    data = captioned(several(tmp_path), CaptionRule(), stages=[even])
    samples = [data[StreamPosition(0, place, place % 6)] for place in range(60)]
    assert {sample.sample_id for sample in samples} == {0, 2, 4}
    assert not any(sample.is_substitute for sample in samples)
    assert all(sample.is_valid for sample in samples)
    assert caplog.text == ""
    evaluated = captioned(several(tmp_path), CaptionRule(), stages=[even], is_evaluation=True)
    assert [evaluated[StreamPosition(0, i, i)].is_valid for i in range(4)] == [
        True,
        False,
        True,
        False,
    ]


def test_a_stage_may_leave_out_by_lot(tmp_path):
    def lucky(samples):
        yield from (sample for sample in samples if random.random() < 0.3)

    data = captioned(several(tmp_path), CaptionRule(), stages=[lucky])
    assert all(data[StreamPosition(0, place, place % 6)].caption for place in range(100))


def test_stages_that_leave_out_everything_end_the_run(tmp_path):
    data = captioned(several(tmp_path), CaptionRule(), stages=[lambda samples: iter(())])
    with pytest.raises(UserError, match="stages leave out 1000 samples in a row"):
        data[StreamPosition(0, 0, 0)]


def test_every_bad_sample_is_written_down(tmp_path):
    shards = write_bad(tmp_path, {i: {"png": b"junk"} for i in (2, 4)})
    path = tmp_path / "bad.jsonl"
    data = dataset(shards, bad_sample_log=str(path))
    for place in range(200):
        data[StreamPosition(3, place, 2)]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) > 200  # some substitutes are bad, too
    assert records[0] == {
        "shard": str(shards[0]),
        "key": "key2",
        "sample_id": 2,
        "epoch": 3,
        "position": 0,
        "source": 0,
        "reason": records[0]["reason"],
    }
    assert "cannot be decoded" in records[0]["reason"]
    assert {record["key"] for record in records} == {"key2", "key4"}


def test_substitutes_stay_in_the_source(tmp_path):
    shards = write_shards(tmp_path, (2, 4, 6))
    spoiled = Path(shards[0]).read_bytes().replace(b"PNG\r", b"JNK\r")
    Path(shards[0]).write_bytes(spoiled)
    data = dataset(shards, source_ranges=[(0, 6), (6, 12)])
    ids = {data[StreamPosition(0, place, 0)].sample_id for place in range(100)}
    assert ids == {2, 3, 4, 5}


def write_recaptioned(folder):
    """A shard of six samples with alt texts and, but for the last, synthetic captions."""
    members = []
    for i in range(6):
        said = {"synthetic": [f"picture {i}", f"photo {i}"]} if i < 5 else {}
        parts = {"png": encode(picture(i)), "txt": caption(i).encode()}
        members.append((f"key{i}", {**parts, "json": json.dumps(said).encode()}))
    return [write_shard(folder / "a.tar", members)]


def recaptioned(shards, rule, **options):
    table = build_pair_table(
        [str(s) for s in shards], image_extensions=("png",), caption_extensions=("txt", "json")
    )
    settings = {"seed": 7, "pictures": PicturePolicy(), "captions": rule} | options
    return PairDataset(table, training_transform(tiny_inputs(), (0.3, 1.0)), **settings)


BOTH = CaptionRule(members=("txt", "json"), pick="random", weights={"txt": 1, "synthetic": 1})


def test_captions_of_several_fields_come_together_as_a_function_of_the_place(tmp_path):
    shards = write_recaptioned(tmp_path)
    data, plain = recaptioned(shards, BOTH), recaptioned(shards, CaptionRule())
    seen = set()
    for place in range(20):
        at = StreamPosition(1, place, 2)
        sample, alone = data[at], plain[at]
        assert sample.more_captions == recaptioned(shards, BOTH)[at].more_captions
        assert sample._replace(more_captions=())[1:] == alone[1:]
        assert torch.equal(sample.image, alone.image)
        seen.update(sample.more_captions)
    assert seen == {"picture 2", "photo 2"}
    assert data[StreamPosition(0, 0, 5)].more_captions == (caption(5),)
    evaluated = recaptioned(shards, BOTH, is_evaluation=True)[StreamPosition(0, 0, 2)]
    assert (evaluated.caption, evaluated.more_captions) == (caption(2), ())
    assert data.raw(2)[2] == caption(2)


def test_a_field_that_none_of_the_next_samples_has_is_refused(tmp_path, caplog):
    shards = write_recaptioned(tmp_path)
    upcoming = [StreamPosition(0, place, place) for place in range(6)]
    with caplog.at_level("INFO"):
        check_captions(recaptioned(shards, BOTH), [upcoming], is_told=True)
    assert "captions of the next 6 training samples: txt in 6, synthetic in 5" in caplog.text
    misspelt = CaptionRule(members=("txt", "json"), probabilities={"txt": 0.5, "sythetic": 0.5})
    with pytest.raises(UserError, match="none of the next 6 training samples has field 'sythetic'"):
        check_captions(recaptioned(shards, misspelt), [upcoming], is_told=True)


def shouted(samples):
    for sample in samples:
        more = [text.upper() for text in sample["more_texts"]]
        yield {**sample, "text": sample["text"].upper(), "more_texts": more}


def forgetful(samples):
    for sample in samples:
        yield {**sample, "more_texts": []}


def test_a_stage_sees_all_captions_and_must_leave_as_many(tmp_path):
    shards = write_recaptioned(tmp_path)
    sample = recaptioned(shards, BOTH, stages=[shouted])[StreamPosition(0, 0, 2)]
    assert sample.caption == caption(2).upper()
    assert sample.more_captions[0] in ("PICTURE 2", "PHOTO 2")
    with pytest.raises(UserError, match="stage forgetful must leave 1 strings under 'more_texts'"):
        recaptioned(shards, BOTH, stages=[forgetful])[StreamPosition(0, 0, 2)]


@pytest.mark.parametrize("field", ["weights", "probabilities"])
def test_on_other_ranks_from_a_position_on_captions_are_those_of_the_whole_run(tmp_path, field):
    rule = CaptionRule(
        members=("txt", "json"), pick="random", **{field: {"txt": 0.5, "synthetic": 0.5}}
    )
    data = recaptioned(write_recaptioned(tmp_path), rule)
    plan = BatchPlan(
        counts=data.table.counts, fingerprint="", seed=7, global_batch_size=2, block_shards=1
    )

    def seen(world_size, done, num_batches):
        """Captions of the batches after ``done`` samples, in the order of the run."""
        ranks = [
            islice(
                GlobalBatchSampler(plan, rank=rank, world_size=world_size, progress=Progress(done)),
                num_batches,
            )
            for rank in range(world_size)
        ]
        positions = [at for batch in zip(*ranks, strict=True) for part in batch for at in part]
        return [(s.caption, *s.more_captions) for s in (data[at] for at in positions)]

    whole = seen(1, 0, 30)
    assert whole == seen(1, 0, 13) + seen(2, 26, 17)
    assert len({caption for each in whole for caption in each}) > 10
