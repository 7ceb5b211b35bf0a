"""Broken and hostile Parquet through the real path: one line, or a substitute that is named."""

import base64
import io
import os
import re
import struct
import tracemalloc

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from pyarrow.parquet import encryption

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.parquet import ParquetError
from dist_siglip.data.parquet import footer as footer_module
from dist_siglip.data.parquet.rows import ParquetRows, address
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.errors import UserError
from tests.support.parquet import rows_of
from tests.support.shards import caption, encode, picture, tiny_inputs

PLAIN = {"compression": "none", "use_dictionary": False, "row_group_size": 4}


def file_of(table, **options):
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **{**PLAIN, **options})
    return buffer.getvalue()


GOOD = file_of(rows_of(0, 12))


def with_footer(data, footer):
    """The file with another footer."""
    length = struct.unpack("<I", data[-8:-4])[0]
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def footer_of(data):
    return data[-8 - struct.unpack("<I", data[-8:-4])[0] : -8]


def open_table(tmp_path, data, name="a.parquet", members=("txt",), **options):
    (tmp_path / name).write_bytes(data)
    return build_pair_table(
        [str(tmp_path / name)],
        image_extensions=PICTURE_EXTENSIONS,
        caption_extensions=members,
        **options,
    )


DAMAGED = {
    "empty": (b"", "it is empty"),
    "four bytes": (b"PAR1", "cut short"),
    "cut": (GOOD[:-100], "cut short"),
    "a tar": (bytes(2048), "cut short"),
    "encrypted": (GOOD[:-4] + b"PARE", "encrypted"),
    "footer longer than the file": (GOOD[:-8] + b"\xff\xff\xff\x7fPAR1", "footer has"),
    "footer of zeros": (with_footer(GOOD, bytes(200)), "footer cannot be read"),
    "footer cut": (with_footer(GOOD, footer_of(GOOD)[:300]), "footer cannot be read"),
    "footer signed": (with_footer(GOOD, footer_of(GOOD) + bytes(28)), "28 bytes sign its footer"),
    "no footer": (with_footer(GOOD, b""), "footer cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name):
    data, message = DAMAGED[name]
    with pytest.raises(UserError, match=message) as info:
        open_table(tmp_path, data)
    assert "\n" not in str(info.value)
    assert "a.parquet" in str(info.value)


class Keys(encryption.KmsClient):
    """A key is wrapped by Base64."""

    def __init__(self, _):
        super().__init__()

    def wrap_key(self, key_bytes, _):
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key, _):
        return base64.b64decode(wrapped_key)


def test_encrypted_columns_behind_a_plain_footer_are_told(tmp_path):
    """pyarrow ends the process when it is asked for the place of such a column."""
    settings = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": ["caption"]}, plaintext_footer=True
    )
    properties = encryption.CryptoFactory(Keys).file_encryption_properties(
        encryption.KmsConnectionConfig(), settings
    )
    data = file_of(rows_of(0, 4), encryption_properties=properties)
    with pytest.raises(UserError, match="encrypted columns are not read") as caught:
        open_table(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_of_another_name_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"is a Parquet file; give it a name that ends in \.parquet"
    ):
        open_table(tmp_path, GOOD, "a.tar")


def test_rows_of_no_group_and_no_rows(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        open_table(tmp_path, file_of(rows_of(0, 0)))


def test_a_footer_that_claims_more_rows_than_bytes_is_refused(tmp_path, monkeypatch):
    many = pyarrow.table({"image": pyarrow.nulls(300_000, pyarrow.binary())})
    data = file_of(many, row_group_size=300_000)
    assert len(data) < 10_000
    with pytest.raises(UserError, match="claims 300000 rows in"):
        open_table(tmp_path, data)


def sample_of(tmp_path, data, number, caplog, **options):
    """Read one sample; its substitute comes from the rows that are sound."""
    table = open_table(tmp_path, data, **options)
    transform = training_transform(tiny_inputs(), None)
    rule = CaptionRule(members=options.get("members", ("txt",)))
    dataset = PairDataset(table, transform, seed=0, pictures=PicturePolicy(), captions=rule)
    return dataset[StreamPosition(0, 0, number)]


def broken(find, replacement, number=0):
    """The sound file with some bytes replaced by as many."""
    place = -1
    for _ in range(number + 1):
        place = GOOD.index(find, place + 1)
    return GOOD[:place] + replacement + GOOD[place + len(replacement) :]


PICTURE = encode(picture(5))
LENGTH = struct.pack("<I", len(PICTURE))
BAD_ROWS = {
    "no picture": (broken(PICTURE, b"junk" * 50), "cannot be decoded"),
    "a length beyond the page": (broken(LENGTH + PICTURE, b"\xff\xff\xff\x0f"), "beyond its page"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_replaced_and_named(tmp_path, caplog, name):
    data, reason = BAD_ROWS[name]
    sample = sample_of(tmp_path, data, 5, caplog)
    assert sample.is_substitute
    assert sample.caption == caption(sample.sample_id)
    assert "a.parquet/000000005" in caplog.text
    assert reason in caplog.text


def page_header(kind, full_size, size, num_values, encoding=0):
    """A header as Thrift's compact protocol writes it."""

    def zigzag(value):
        value, out = value << 1 if value >= 0 else (-value << 1) - 1, b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    inner = b"\x15" + zigzag(num_values) + b"\x15" + zigzag(encoding)
    inner += b"\x15" + zigzag(3) + b"\x15" + zigzag(3) + b"\0"
    outer = b"\x15" + zigzag(kind) + b"\x15" + zigzag(full_size) + b"\x15" + zigzag(size)
    return outer + b"\x2c" + inner + b"\0"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (page_header(0, 2**31 - 1, 2**31 - 1, 4), "bytes and"),
        (page_header(0, 100, 1000, 4), "a page of 100 bytes"),
        (page_header(0, -5, -5, 4), "a page of -5 bytes"),
        (page_header(0, 1000, 1000, 2**30), "1073741824 values"),
        (page_header(0, 1000, 1000, 1), "a page"),
        (page_header(0, 2**27, 2**27, 4), "beyond its column chunk"),
        (page_header(2, 1000, 1000, 4), "page"),
        (b"\x1c" * 40, "nested too deeply"),
        (b"\xff" * 40, "page header|a number"),
        (b"\0", "page"),
    ],
)
def test_a_page_header_that_lies_is_a_bad_row_and_takes_no_memory(tmp_path, caplog, header, reason):
    """The first row group of pictures is damaged; substitutes come from the others."""
    data = GOOD[:4] + header + GOOD[4 + len(header) :]
    tracemalloc.start()
    sample = sample_of(tmp_path, data, 2, caplog)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sample.is_substitute
    assert sample.sample_id >= 4
    assert most < 20_000_000
    lines = [record.getMessage() for record in caplog.records]
    assert re.search(reason, caplog.text)
    assert all("\n" not in line for line in lines)


def test_a_page_that_unpacks_to_more_than_it_says_is_a_bad_row(tmp_path, caplog):
    """A zip bomb: a gigabyte of zeros, said to be a few bytes, or said to be what it is."""
    bomb = pyarrow.Codec("zstd").compress(bytes(1 << 26), asbytes=True)
    rows = rows_of(0, 12)
    data = file_of(
        rows,
        compression={"image.bytes": "zstd"}
        | dict.fromkeys(["image.path", "caption", "alt.list.element", "label", "secret"], "none"),
    )
    for full_size in (5000, 1 << 31):
        header = page_header(0, full_size, len(bomb), 4)
        assert len(header) + len(bomb) < data.index(b"pair number")
        broken_data = data[:4] + header + bomb + data[4 + len(header) + len(bomb) :]
        sample = sample_of(tmp_path, broken_data, 2, caplog)
        assert sample.is_substitute
        assert sample.sample_id >= 4
        caplog.clear()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([[["a"]]], "list"),
        ({"a": "b"}, "dict"),
    ],
)
def test_a_caption_of_another_type_is_named(tmp_path, caplog, value, kind):
    rows = [{"image": encode(picture(i)), "text": value} for i in range(3)]
    data = file_of(pyarrow.Table.from_pylist(rows))
    with pytest.raises(UserError, match="are all bad"):
        sample_of(tmp_path, data, 0, caplog)
    assert f"column 'text' holds {kind}, no text" in caplog.text
    assert "captions.members [json]" in caplog.text


BAD_TEXT = pyarrow.array([b"\xff"]).view(pyarrow.string())
UNREADABLE = {
    "text in a list": pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], "int32"), BAD_TEXT),
    "text in an object": pyarrow.StructArray.from_arrays([BAD_TEXT], ["a"]),
    "day of the year 2,739,877": pyarrow.array([10**9], "int32").cast("date32"),
    "time after the year 9999": pyarrow.array([2**62], pyarrow.timestamp("us")),
    "unknown time zone": pyarrow.array([1], pyarrow.timestamp("s", tz="Mars/Phobos")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_cell_that_python_has_no_value_for_is_a_bad_row(tmp_path, caplog, name):
    rows = rows_of(0, 12).append_column("odd", pyarrow.concat_arrays([UNREADABLE[name]] * 12))
    table = open_table(tmp_path, file_of(rows), members=("json",))
    reader = ShardReader()
    ((_, span),) = table.caption_spans(0)
    with pytest.raises(BadSampleError, match="column 'odd' cannot be read: ") as caught:
        reader.read(span)
    reader.close()
    assert "\n" not in str(caught.value)


def test_a_row_of_references_that_stand_for_more_than_is_read_is_a_bad_row(tmp_path, monkeypatch):
    """A text of 10 kB that a list names 300 times, and columns that each are small enough."""
    monkeypatch.setattr("dist_siglip.data.parquet.rows.LARGEST_PAGE", 1 << 20)
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, "int32"), ["x" * 10_000])
    bomb = pyarrow.ListArray.from_arrays(pyarrow.array([0, 300], "int32"), text)
    part = pyarrow.ListArray.from_arrays(pyarrow.array([0, 60], "int32"), text[:60])
    wide = pyarrow.array([bytes(4096)] * 300, pyarrow.binary(4096))
    for columns, number, message in (
        ({"alt": bomb}, 0, r"column 'alt' holds 30.*bytes in one row, at most 1048576 are read"),
        ({"a": part, "b": part}, 2, r"row has more than 1048576 bytes"),
        ({"alt": wide}, 0, r"column 'alt' has 300 values in 1228800 bytes in one row group"),
    ):
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            rows = ParquetRows(descriptor)
            before = pyarrow.total_allocated_bytes()
            with pytest.raises(ParquetError, match=message):
                rows.read(address(number, 0))
            assert pyarrow.total_allocated_bytes() - before < 100_000
        finally:
            os.close(descriptor)


def test_null_rows_that_the_footer_hides_are_bad_rows(tmp_path, caplog):
    rows = rows_of(0, 12).select(["image", "caption"]).to_pylist()
    rows[5]["image"] = None
    data = file_of(pyarrow.Table.from_pylist(rows), write_statistics=False)
    assert sample_of(tmp_path, data, 5, caplog).is_substitute
    assert "holds nothing in row 5" in caplog.text


def test_a_file_that_changed_after_it_was_indexed_gives_bad_rows(tmp_path, caplog):
    table = open_table(tmp_path, GOOD)
    (tmp_path / "a.parquet").write_bytes(file_of(rows_of(0, 6)))
    data = PairDataset(
        table, training_transform(tiny_inputs(), None), seed=0, pictures=PicturePolicy()
    )
    sample = data[StreamPosition(0, 0, 11)]
    assert sample.is_substitute
    assert "row 11 of 6: the file changed" in caplog.text


def test_names_of_columns_cannot_break_a_line(tmp_path):
    table = pyarrow.table({"a\nb\x1b[2J": ["x"], "image": [encode(picture(0))]})
    with pytest.raises(UserError, match=r"a\\nb\\x1b") as info:
        open_table(tmp_path, file_of(table))
    assert "\n" not in str(info.value)


def test_a_chunk_in_another_file_or_place_is_not_read():
    class Elsewhere:
        file_path, data_page_offset, dictionary_page_offset = "/etc/passwd", 4, None
        total_compressed_size, num_values, compression = 10, 1, "UNCOMPRESSED"

    found = footer_module.ParquetFooter(footer_of(GOOD), len(GOOD))
    assert found.chunk(0, 0).offset == 4

    class Metadata:
        schema = found.metadata.schema

        @staticmethod
        def row_group(group):
            return type("Group", (), {"column": staticmethod(lambda leaf: Elsewhere)})

    found.metadata = Metadata
    with pytest.raises(footer_module.ParquetError, match="in another file"):
        found.chunk(0, 1)
    Elsewhere.file_path = ""
    for offset, size in ((4, 10**9), (-1, 4), (len(GOOD), 1), (2**62, 2**62)):
        Elsewhere.data_page_offset, Elsewhere.total_compressed_size = offset, size
        with pytest.raises(footer_module.ParquetError, match="is not in the file"):
            found.chunk(0, 1)
    assert np.size(found.starts) == 4
