"""A table of paths and captions as a shard of its own."""

import json
import os
import pickle

import pytest
import torch

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.inspect import Inspector, read_first_pair
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.packing import write_table
from tests.support.shards import caption, encode, picture, tiny_inputs, write_shard

COUNT = 7


@pytest.fixture
def folder(tmp_path):
    """Pictures in a folder below that of the table."""
    place = tmp_path / "set"
    (place / "pictures").mkdir(parents=True)
    for i in range(COUNT):
        (place / "pictures" / f"{i}.a.png").write_bytes(encode(picture(i)))
    return place


def rows(**more):
    return [
        {"image": f"pictures/{i}.a.png", "caption": caption(i), "site": f"é{i}", **more}
        for i in range(COUNT)
    ]


def table_of(shards, **options):
    return build_pair_table(
        [str(each) for each in shards],
        **{"image_extensions": PICTURE_EXTENSIONS, "caption_extensions": ("txt",), **options},
    )


def dataset(table, **options):
    transform = training_transform(tiny_inputs(), (0.3, 1.0))
    return PairDataset(table, transform, seed=0, pictures=PicturePolicy(), **options)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_gives_the_samples_of_a_tar(folder, tmp_path, suffix):
    path = write_table(folder / f"captions{suffix}", rows())
    assert expand_shards(str(folder)) == expand_shards(str(path)) == [str(path)]
    members = [
        (f"{i:09d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in range(COUNT)
    ]
    tar = write_shard(tmp_path / "a.tar", members)
    ours, theirs = dataset(table_of([path])), dataset(table_of([tar]))
    assert ours.table.counts == theirs.table.counts
    ours = pickle.loads(pickle.dumps(ours))  # as in a loader process
    for i in range(COUNT):
        found, wanted = (each[StreamPosition(0, i, i)] for each in (ours, theirs))
        assert (found.caption, found.picture_id) == (wanted.caption, wanted.picture_id)
        assert torch.equal(found.image, wanted.image)
        assert not found.is_substitute
    assert ours.table.names(range(COUNT)) == [(str(path), f"{i:09d}") for i in range(COUNT)]
    assert {entry.name for entry in folder.iterdir()} == {"pictures", path.name}


def test_columns_are_members_and_the_row_is_json(folder):
    captions = [["a hen", "a bird"], ["two hens"]] + [["x"]] * (COUNT - 2)
    with_lists = [
        {**row, "caption": texts, "n": i}
        for i, (row, texts) in enumerate(zip(rows(), captions, strict=True))
    ]
    path = write_table(folder / "a.jsonl", with_lists)
    rule = CaptionRule(members=("json",), pick="random")
    data = dataset(table_of([path], caption_extensions=("json",)), captions=rule, picture_id="n")
    assert {data[StreamPosition(0, i, 0)].caption for i in range(20)} == {"a hen", "a bird"}
    site = CaptionRule(members=("site",))
    data = dataset(table_of([path], caption_extensions=("site",)), captions=site)
    assert data[StreamPosition(0, 0, 3)].caption == "é3"
    with pytest.raises(UserError, match="7 of 7 samples have no caption"):
        table_of([path])


def test_a_run_goes_on_at_the_exact_sample_in_a_mixture_with_tars(folder, tmp_path):
    path = write_table(folder / "a.csv", rows())
    tar = write_shard(tmp_path / "a.tar", [("k", {"png": encode(picture(8)), "txt": b"a fox"})])

    def batches(consumed, rank=0, world_size=1):
        table = table_of([path, tar])
        plan = BatchPlan(
            counts=table.counts,
            fingerprint=table.fingerprint,
            seed=3,
            global_batch_size=4,
            block_shards=16,
        )
        progress = Progress()
        progress.samples_consumed = consumed
        sampler = iter(
            GlobalBatchSampler(plan, rank=rank, world_size=world_size, progress=progress)
        )
        data = dataset(table)
        return [[data[at] for at in next(sampler)] for _ in range(4)]

    whole = batches(0)
    resumed = batches(8)
    for found, wanted in zip(resumed[:2], whole[2:], strict=True):
        assert [each.sample_id for each in found] == [each.sample_id for each in wanted]
        assert all(torch.equal(a.image, b.image) for a, b in zip(found, wanted, strict=True))
    halves = [batches(8, rank, 2)[0] for rank in range(2)]
    assert sorted(each.sample_id for half in halves for each in half) == sorted(
        each.sample_id for each in whole[2]
    )


def test_a_data_module_takes_the_folder(folder):
    write_table(folder / "a.csv", rows())
    data = ImageTextDataModule(
        train_shards=str(folder),
        inputs=tiny_inputs(),
        global_batch_size=4,
        workers_per_rank=0,
    )
    data.check(world_size=2)
    assert data.tables.of("train_shards").num_samples == COUNT


def test_a_change_is_another_data_set(folder):
    path = write_table(folder / "a.csv", rows())
    first = table_of([path])
    assert table_of([path]).fingerprint == first.fingerprint
    changed = rows()
    changed[3]["caption"] = changed[3]["caption"][::-1]
    write_table(path, changed)
    assert table_of([path]).fingerprint != first.fingerprint
    reader = ShardReader()
    with pytest.raises(BadSampleError, match="table has changed since it was indexed"):
        reader.read(first.image_span(0))
    second = table_of([path])
    (folder / "pictures" / "0.a.png").write_bytes(encode(picture(5, side=30)))
    with pytest.raises(BadSampleError, match="when it was indexed"):
        ShardReader().read(second.image_span(0))
    assert table_of([path]).fingerprint != second.fingerprint  # no kept table hides it


def leads_out(folder, tmp_path, how):
    """A path of a picture that is none of the folder's."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(picture(9)))
    if how == "link":
        (folder / "link.png").symlink_to(secret)
        return "link.png"
    if how == "folder that is a link":
        (folder / "away").symlink_to(tmp_path)
        return "away/secret.png"
    return {"..": "../secret.png", "absolute": str(secret)}[how]


@pytest.mark.parametrize("how", ["..", "absolute", "link", "folder that is a link"])
@pytest.mark.parametrize("on_damage", ["refuse", "skip"])
def test_a_path_out_of_the_folder_is_refused(folder, tmp_path, how, on_damage):
    changed = rows()
    changed[2]["image"] = leads_out(folder, tmp_path, how)
    path = write_table(folder / "a.csv", changed)
    with pytest.raises(UserError, match=r"of row 2 of table .* lies outside of its folder") as info:
        table_of([path], on_damage=on_damage, max_bad_fraction=1)
    assert "\n" not in str(info.value)


def test_a_picture_that_becomes_a_link_out_is_not_read(folder, tmp_path):
    table = table_of([write_table(folder / "a.csv", rows())])
    inside = folder / "pictures" / "0.a.png"
    outside = tmp_path / "secret.png"
    os.replace(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(BadSampleError, match="lies outside"):
        ShardReader().read(table.image_span(0))


def test_rows_that_cannot_be_used_are_counted_before_training(folder):
    (folder / "fifo.png").parent.mkdir(exist_ok=True)
    os.mkfifo(folder / "fifo.png")
    lines = [json.dumps(row) for row in rows()]
    lines += [
        '{"image": "missing.png", "caption": "a"}',
        '{"image": "fifo.png", "caption": "a"}',
        '{"image": "a\\u0000.png", "caption": "a"}',
        '{"image": "", "caption": "a"}',
        '{"image": "notes.txt", "caption": "a"}',
        '{"image": 7, "caption": "a"}',
        '{"caption": "a"}',
        "{",
        "[" * 100_000,
    ]
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"9 of 16 samples have no picture .*'000000007'"):
        table_of([path])
    table = table_of([path], on_damage="skip", max_bad_fraction=0.9)
    assert table.num_samples == COUNT
    inspect = Inspector(
        image_extensions=PICTURE_EXTENSIONS, captions=CaptionRule(), pictures=PicturePolicy()
    )
    kinds = [finding.kind for finding in inspect(str(path)).findings]
    assert (kinds.count("no picture"), kinds.count("no caption")) == (9, 2)
    pair = read_first_pair(
        str(path),
        captions=CaptionRule(),
        image_extensions=PICTURE_EXTENSIONS,
        pictures=PicturePolicy(),
    )
    assert (pair.num_samples, pair.had_side_car) == (0, True)
    assert "have no picture" in pair.failure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,caption\n1,b\n", "no column of pictures .*it has a, caption"),
        ('image,caption\na.png,"b\n', "is broken in the row that begins at line 2"),
        ("image,image\na.png,b\n", "names a column twice"),
        ("image,caption\n", "holds no samples"),
        ("", "holds no samples"),
    ],
)
def test_what_is_wrong_with_a_table_as_a_whole_is_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        table_of([tmp_path / "a.csv"])


def test_a_table_that_is_too_large_or_one_of_several_is_refused(folder, monkeypatch):
    path = write_table(folder / "a.csv", rows())
    write_table(folder / "b.jsonl", rows())
    with pytest.raises(UserError, match="is a folder with 2 tables, a"):
        expand_shards(str(folder))
    monkeypatch.setattr("dist_siglip.data.index.table_rows._LARGEST_TABLE", 10)
    with pytest.raises(UserError, match="dist-siglip data pack"):
        table_of([path])
