"""Tables of pictures, and what packing made of them."""

import csv
import json
from pathlib import Path

import pyarrow
from pyarrow import parquet
from webdataset.tariterators import group_by_keys, tar_file_expander

from dist_siglip.data.packing import PackSettings, pack
from dist_siglip.data.packing.table import Columns
from tests.support.shards import caption

COUNT = 23
KINDS = ("JPEG", "PNG", "WEBP")
COLUMNS = Columns()


def write_table(path, rows):
    """Write rows (dicts of text, or of lists of text) as what the name of the file says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows_of(count=COUNT):
    return [{"image": f"{i}.jpg", "caption": caption(i), "site": f"é{i}"} for i in range(count)]


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def samples_of(folder):
    """Read all shards with webdataset, closing them, which its own opener leaves to chance."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}])
            samples += group_by_keys(members)
    return samples


def packed(table, out, images, columns=COLUMNS, **options):
    arguments = {
        name: options.pop(name)
        for name in ("allow_outside", "max_bad_fraction", "workers")
        if name in options
    }
    settings = PackSettings(**{"samples_per_shard": 5, "columns": columns, **options})
    return pack(table, out, settings, images=images, **arguments)


def skipped(out):
    return [json.loads(line) for line in (out / "pack_skipped.jsonl").read_text().splitlines()]
