"""``search`` as a user calls it."""

import io
import json
import shutil
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dist_siglip.cli import main
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.evaluation.embed.stored_rows import StoredRows
from dist_siglip.evaluation.search.pictures import ShardPictures
from dist_siglip.evaluation.search.server import SearchServer
from tests.support.embedding import COUNTS
from tests.support.shards import encode, picture, write_shards
from tests.training.module.test_trained import run_of


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Folder of embeddings of four shards, which remembers its run."""
    folder = tmp_path_factory.mktemp("search")
    write_shards(folder / "shards", COUNTS)
    run, _ = run_of(folder, "clip")
    out = folder / "index"
    words = ["embed", str(folder / "shards"), f"--out={out}", f"--run_dir={run}", "--workers=0"]
    assert main([*words, "--dtype=int8", "--device=cpu"]) == 0
    return out


def test_texts_and_pictures_are_answered_as_json_and_as_tables(
    index, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "ninth.png"
    file.write_bytes(encode(picture(9)))
    assert main(["search", str(index), "pair number 9", str(file), "--k=3", "--json=true"]) == 0
    text, image = json.loads(capsys.readouterr().out)
    assert (text["query"], text["kind"], len(text["pictures"])) == ("pair number 9", "text", 3)
    assert (image["kind"], image["method"]) == ("picture", "exact")
    first = image["pictures"][0]
    assert first["score"] == pytest.approx(1, abs=0.02)
    assert {key: first[key] for key in first if key != "score"} == {
        "rank": 1,
        "row": 9,
        "key": "000009",
        "shard": "00002.tar",
        "place": 1,
        "caption": "pair number 9",
    }
    scores = [each["score"] for each in text["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert main(["search", str(index), str(file), "--k=2"]) == 0
    shown = capsys.readouterr().out
    assert "pair number 9" in shown
    assert "2 best of 25 pictures by cosine (exact)" in shown


def test_a_run_that_moved_is_named_anew_and_another_is_refused(index, tmp_path, capsys):
    run = Path(json.loads((index / "source.json").read_text())["run_dir"])
    moved = shutil.copytree(index, tmp_path / "index")
    source = json.loads((moved / "source.json").read_text())
    (moved / "source.json").write_text(json.dumps(source | {"run_dir": str(tmp_path / "gone")}))
    assert main(["search", str(moved), "a pair"]) == 2
    assert "holds no readable config.yaml" in capsys.readouterr().err
    assert main(["search", str(moved), "a pair", f"--run_dir={run}"]) == 0
    other, _ = run_of(tmp_path, "siglip")
    capsys.readouterr()
    assert main(["search", str(moved), "a pair", f"--run_dir={other}"]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "was made by another model, or other weights: the image towers differ" in complaint
    (moved / "source.json").write_text(json.dumps({"shards": source["shards"]}))
    assert main(["search", str(moved), "a pair"]) == 2
    assert "does not say its model; name it by --run_dir" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["rows.csv", "rows.parquet"])
def test_rows_of_other_formats_are_searched_as_they_were_embedded(
    tmp_path, capsys, monkeypatch, source
):
    monkeypatch.chdir(tmp_path)
    lines = ["image,caption"]
    for number in range(6):
        grey = np.full((24, 24), 100, dtype=np.uint16)
        grey[number * 3 : number * 3 + 6, 4:20] = 900
        Image.fromarray(grey).save(f"{number}.tif")
        lines.append(f"{number}.tif,pair number {number}")
    Path("rows.csv").write_text("\n".join(lines) + "\n")
    pictures = [Path(f"{number}.tif").read_bytes() for number in range(6)]
    rows = {"image": pictures, "caption": [line.split(",")[1] for line in lines[1:]]}
    parquet.write_table(pyarrow.table(rows), "rows.parquet")
    run, _ = run_of(tmp_path, "clip")
    options = ["--formats=[png,tiff]", "--intensity_window=[0,1000]", "--device=cpu", "--workers=0"]
    assert main(["embed", source, "--out=e", f"--run_dir={run}", *options]) == 0
    capsys.readouterr()
    assert main(["search", "e", "4.tif", "--k=2", "--json=true"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["pictures"][0]["row"] == 4
    assert answer["pictures"][0]["score"] == pytest.approx(1, abs=1e-3)
    stored = StoredRows(Path("e"))
    policy = PicturePolicy(formats=("tiff",), intensity_window=(0, 1000))
    copies = ShardPictures(stored, policy, shards=None, cache=CacheSettings())
    kind, data = copies.copy(4)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert (kind, pixels[13, 10, 0], pixels[2, 2, 0]) == ("image/png", 230, 26)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "query is missing: give a text or a picture after the folder, or --serve"),
        (["a pair", "--serve"], "query (a pair) is typed on the page"),
        (["gone.jpg"], "query (gone.jpg) cannot be read (No such file or directory); name a"),
        (["README.md"], "query (README.md): picture cannot be decoded"),
        (["a pair", "--k=0"], "k (0) must be"),
        (["--serve", "--port=99999"], "port (99999) must be in [0, 65535]"),
        (["--serve", "--port=0", "--host=256.1.1.1"], "host (256.1.1.1), port (0) cannot be"),
        (["--serve", "--port=0", "--shards=gone"], "say where the pictures are now with --shards"),
        (["a pair", "--device=abacus"], "device (abacus) cannot be used"),
        (["a pair", "--kk=1"], "configuration key (kk) is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(index, capsys, options, message):
    assert main(["search", str(index), *options]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("dist-siglip: error: ")
    assert message in complaint


def test_a_folder_that_is_no_index_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone"):
        assert main(["search", str(folder), "a pair"]) == 2
        assert "has no readable source.json (" in capsys.readouterr().err.splitlines()[-1]


def test_the_page_is_served_until_it_is_interrupted(index, capsys, monkeypatch):
    seen = []

    def visit(server):
        """What a browser gets, and then Ctrl-C."""
        thread = threading.Thread(target=SearchServer.__mro__[1].serve_forever, args=(server,))
        thread.start()
        with urllib.request.urlopen(f"{server.url}search?text=a%20pair&k=2", timeout=60) as answer:
            seen.append(json.loads(answer.read()))
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(SearchServer, "serve_forever", visit, raising=False)
    assert main(["search", str(index), "--serve", "--port=0"]) == 0
    assert "serving 25 pictures at http://127.0.0.1:" in capsys.readouterr().out
    assert len(seen[0]["pictures"]) == 2
