"""Training from Parquet: the batches that the same samples in tars give, resumed anywhere."""

import itertools
import pickle
import sys
from itertools import islice

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.inspect import Gauge, Inspector
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.order.sequence import Source, StreamPosition
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule.image_text import ImageTextDataModule
from tests.support.parquet import rows_of, write_parquet
from tests.support.shards import UNEVEN, caption, encode, picture, tiny_inputs, write_shards

POLICY = PicturePolicy()
FIRST = CaptionRule()


def table_of(shards, members=("txt",), **options):
    return build_pair_table(
        shards, image_extensions=PICTURE_EXTENSIONS, caption_extensions=members, **options
    )


def dataset(shards, rule=FIRST):
    transform = training_transform(tiny_inputs(), (0.3, 1.0))
    table = table_of(shards, rule.members)
    return PairDataset(table, transform, seed=5, pictures=POLICY, captions=rule)


def batches(data, *, start=0, count=8, world_size=1, sources=()):
    """Global batches of 6, of all ranks, from a position on."""
    table = data.table
    plan = BatchPlan(
        counts=table.counts,
        fingerprint=table.fingerprint,
        seed=3,
        global_batch_size=6,
        block_shards=2,
        sources=sources,
    )
    samplers = [
        GlobalBatchSampler(plan, rank=rank, world_size=world_size, progress=Progress(start))
        for rank in range(world_size)
    ]
    steps = islice(zip(*samplers, strict=True), count)
    return [[data[at] for part in parts for at in part] for parts in steps]


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(itertools.chain(*some), itertools.chain(*others), strict=True):
        assert torch.equal(one.image, other.image)
        for name in ("caption", "sample_id", "is_valid", "is_substitute", "picture_id", "draw"):
            assert getattr(one, name) == getattr(other, name)


def test_batches_are_those_of_the_same_samples_in_tars(tmp_path):
    tars = dataset(write_shards(tmp_path / "tar"))
    for number, options in enumerate(({}, {"compression": "none"}, {"row_group_size": 1000})):
        files = dataset(write_parquet(tmp_path / f"{number}", **options))
        assert files.table.counts == UNEVEN
        assert_same(batches(files, count=13), batches(tars, count=13))


def test_a_run_goes_on_at_the_exact_sample_on_other_ranks(tmp_path):
    data = dataset(write_parquet(tmp_path))
    whole = batches(data, count=12)
    again = pickle.loads(pickle.dumps(data))
    parts = batches(again, count=5, world_size=3)
    parts += batches(again, start=30, count=4, world_size=2)
    parts += batches(again, start=54, count=3, world_size=1)
    assert_same(parts, whole)


def test_parquet_and_tars_mix(tmp_path):
    """As one list, and as sources of a mixture; each position has the sample it has in tars."""
    tars = write_shards(tmp_path / "tar")
    files = write_parquet(tmp_path / "parquet")
    mixed = [*tars[:2], *files[2:4], *tars[4:]]
    assert_same(batches(dataset(mixed)), batches(dataset(tars)))
    sources = (Source("a", UNEVEN[:3], 3.0), Source("b", UNEVEN[3:], 1.0))
    assert_same(
        batches(dataset([*files[:3], *tars[3:]]), sources=sources, world_size=2),
        batches(dataset(tars), sources=sources),
    )


def test_the_data_module_takes_patterns_folders_and_mixtures(tmp_path):
    write_parquet(tmp_path / "a" / "b", (5, 6))
    write_shards(tmp_path / "tar", (7,))
    for spec in (str(tmp_path / "a/**/*.parquet"), str(tmp_path / "a/b"), str(tmp_path / "a/*/*")):
        module = ImageTextDataModule(spec, inputs=tiny_inputs(), global_batch_size=4)
        module.check(world_size=2)
        assert module.plan is None or module.tables.of("train_shards").num_samples == 11
        assert module.tables.of("train_shards").num_samples == 11
    with pytest.raises(UserError, match=r"names a missing file .*\*\.parquet"):
        expand_shards(str(tmp_path / "none/*.parquet"))
    with pytest.raises(UserError, match=r"holds a \*, and a web server cannot be listed"):
        expand_shards("https://host/set/*.parquet")


def test_a_folder_of_tars_with_tables_beside_them_is_one_of_tars(tmp_path):
    """img2dataset leaves 00000.parquet beside 00000.tar."""
    write_shards(tmp_path, (2,))
    write_parquet(tmp_path, (2,))
    assert expand_shards(str(tmp_path)) == [str(tmp_path / "00000.tar")]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (CaptionRule(), {"pair number 5"}),
        (CaptionRule(members=("caption",)), {"pair number 5"}),
        (CaptionRule(members=("alt",)), {"alt 5"}),
        (CaptionRule(members=("alt",), pick="random"), {"alt 5", "other 5"}),
        (CaptionRule(members=("nothing", "alt", "caption")), {"alt 5"}),
        (CaptionRule(members=("json",)), {"pair number 5"}),
        (CaptionRule(members=("json",), json_field="alt"), {"alt 5"}),
        (
            CaptionRule(members=("json",), probabilities={"alt": 0.5, "caption": 0.5}),
            {"alt 5", "pair number 5"},
        ),
        (
            CaptionRule(members=("alt", "caption"), probabilities={"alt": 0.5, "caption": 0.5}),
            {"alt 5", "pair number 5"},
        ),
    ],
)
def test_captions_come_from_any_column(tmp_path, rule, expected):
    rule.check()
    data = dataset(write_parquet(tmp_path), rule)
    assert {data[StreamPosition(0, place, 5)].caption for place in range(12)} == expected


def test_captions_of_two_columns_train_together(tmp_path):
    rule = CaptionRule(members=("json",), weights={"caption": 1.0, "alt": 2.0})
    sample = dataset(write_parquet(tmp_path), rule)[StreamPosition(0, 0, 8)]
    assert (sample.caption, sample.more_captions) == ("pair number 8", ("alt 8",))


def missing_some(folder, *, pictures=(), captions=()):
    """A file of 10 rows, some of them without a picture or a caption."""
    folder.mkdir(exist_ok=True)
    rows = rows_of(0, 10).select(["image", "caption"]).to_pylist()
    for i in pictures:
        rows[i]["image"] = {"bytes": None, "path": f"/elsewhere/{i}.png"}
    for i in captions:
        rows[i]["caption"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    return str(folder / "a.parquet")


def test_rows_without_a_picture_or_caption_are_refused_or_left_out(tmp_path, caplog):
    path = missing_some(tmp_path, pictures=(4, 7), captions=(1,))
    with pytest.raises(
        UserError, match=r"2 of 10 samples have no picture .*first '000000004'"
    ) as e:
        table_of([path])
    assert "\n" not in str(e.value)
    table = table_of([path], on_damage="skip", max_bad_fraction=0.5)
    assert table.counts == (7,)
    assert table.dropped.tolist() == [[0, 1], [0, 4], [0, 7]]
    data = dataset_of(table)
    assert [data[StreamPosition(0, 0, i)].caption for i in range(7)] == [
        caption(i) for i in (0, 2, 3, 5, 6, 8, 9)
    ]
    assert "no picture" in caplog.text
    assert "no caption" in caplog.text


def dataset_of(table):
    return PairDataset(table, training_transform(tiny_inputs(), None), seed=0, pictures=POLICY)


@pytest.mark.parametrize(
    ("columns", "members", "message"),
    [
        (
            {"image": b"p", "headline": "t"},
            ("txt",),
            "columns image, headline: .* captions.members",
        ),
        ({"left": b"p", "right": b"p", "text": "t"}, ("txt",), "left, right, .*image_extensions"),
        ({"url": "http://a", "text": "t"}, ("txt",), "no picture .* columns url, text"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(
    tmp_path, columns, members, message
):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([columns] * 3), path)
    with pytest.raises(UserError, match=message) as info:
        table_of([str(path)], members)
    assert "\n" not in str(info.value)


def test_changed_rows_change_the_fingerprint_and_other_columns_are_not_looked_at(tmp_path):
    first = table_of(write_parquet(tmp_path / "a"))
    assert first.fingerprint == table_of(write_parquet(tmp_path / "b")).fingerprint
    parquet.write_table(rows_of(1, UNEVEN[0]), tmp_path / "b" / "00000.parquet", row_group_size=4)
    changed = table_of(expand_shards(str(tmp_path / "b")))
    assert changed.fingerprint != first.fingerprint
    lines = zip(changed.shard_lines.split("\n"), first.shard_lines.split("\n"), strict=True)
    assert [one == other for one, other in lines] == [False] + [True] * 5


def test_stats_and_checks_look_at_parquet(tmp_path):
    shards = write_parquet(tmp_path, (4, 5))
    measured = Gauge(table=table_of(shards), captions=CaptionRule(), pictures=POLICY)(range(9))
    assert measured.numbers[:, :2].tolist() == [[20, 20]] * 9
    assert measured.numbers[0, 2:].tolist() == [len(encode(picture(0))), len(caption(0))]
    assert (set(measured.formats), measured.num_bad) == ({"png"}, 0)
    inspector = Inspector(
        image_extensions=PICTURE_EXTENSIONS, captions=CaptionRule(), pictures=POLICY
    )
    assert inspector(shards[0]).findings == []
    found = inspector(missing_some(tmp_path / "bad", pictures=(2,), captions=(5,)))
    assert {(one.kind, one.key) for one in found.findings} == {
        ("no picture", "000000002"),
        ("no caption", "000000005"),
    }


def test_a_table_of_parquet_is_kept_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = write_parquet(tmp_path / "a")
    first = table_of(shards)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # no footer is parsed
    again = table_of(shards)
    assert again.file is not None
    assert isinstance(again.image_offsets.base, np.memmap | np.ndarray)
    assert again.fingerprint == first.fingerprint
    assert again.image_offsets.tolist() == first.image_offsets.tolist()


def test_without_pyarrow_there_is_one_line(tmp_path, monkeypatch):
    shards = write_parquet(tmp_path, (3,))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'needs pyarrow; pip install "dist-siglip\[parquet\]"'):
        table_of(shards)
