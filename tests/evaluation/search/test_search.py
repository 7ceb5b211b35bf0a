"""Pictures found for a text, a picture and a row, against products of features computed singly."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.stored_rows import write_source
from dist_siglip.evaluation.search import PictureSearch
from dist_siglip.evaluation.search.pictures import ShardPictures
from tests.support.embedding import COUNTS, build_tiny, expected_rows, table_of
from tests.support.shards import caption, encode, picture, write_shards

SOURCE = {"image_extensions": ["png"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(built):
    return expected_rows(built, range(sum(COUNTS)))


def embedded(shards, built, out, **settings):
    settings = EmbedSettings(**{"workers": 0, "device": "cpu", "dtype": "float32"} | settings)
    embed_shards(table_of(shards), built, out, settings, source=SOURCE)
    return out


@pytest.fixture(scope="module")
def folder(shards, built, tmp_path_factory):
    return embedded(shards, built, tmp_path_factory.mktemp("index") / "e")


def best_of(rows, query, k, but=None):
    scores = [float(np.dot(query.astype(np.float64), row.astype(np.float64))) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -scores[i])
    order = [i for i in order if i != but][:k]
    return order, [scores[i] for i in order]


def check(hits, expected, atol=1e-5):
    order, scores = expected
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=atol)
    assert [hit.row for hit in hits] == order
    for hit in hits:
        assert hit.place.key == f"{hit.row:06d}"
        assert hit.place.caption == caption(hit.row)


@pytest.mark.parametrize("form", ["clip-retrieval", "parquet"])
def test_texts_pictures_and_rows_find_the_nearest_pictures(tmp_path, shards, built, rows, form):
    found = PictureSearch(embedded(shards, built, tmp_path / "e", format=form), built, device=CPU)
    found.rows.keep()
    images, texts = rows
    check(found.by_text(caption(4), 6), best_of(images, texts[4], 6))
    check(found.by_picture(encode(picture(9)), 30), best_of(images, images[9], 30))
    check(found.by_row(9, 5), best_of(images, images[9], 5, but=9))
    assert found.by_picture(encode(picture(9)), 1)[0].row == 9
    assert found.method == "exact"
    with pytest.raises(UserError, match=r"row \(25\) must be 0 to 24"):
        found.by_row(25, 5)
    with pytest.raises(UserError, match="empty text"):
        found.by_text(" \n", 5)
    with pytest.raises(BadSampleError):
        found.by_picture(b"no picture", 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 4},
        {"dim": 4, "rotate": "pca"},
        {"dtype": "int8"},
        {"dtype": "float16", "index": "faiss"},
        {"dtype": "int8", "index": "faiss", "index_kind": "bits"},
        {"dtype": "int8", "towers": "image", "index": "faiss", "index_kind": "bits"},
        {"dtype": "binary", "index": "faiss"},
        {"dtype": "binary", "towers": "image", "index": "faiss"},
    ],
)
def test_queries_are_cut_turned_and_coded_as_the_rows_are(tmp_path, shards, built, settings):
    if "index" in settings:
        pytest.importorskip("faiss", reason="faiss is not installed")
    found = PictureSearch(embedded(shards, built, tmp_path / "e", **settings), built, device=CPU)
    expected = settings.get("index_kind", "flat") if "index" in settings else "exact"
    assert found.method == expected
    hits = found.by_picture(encode(picture(9)), 3)
    if settings.get("dtype") == "binary":  # 8 columns have few bits
        assert 9 in {hit.row for hit in found.by_picture(encode(picture(9)), 12)}
    else:
        assert hits[0].row == 9
        assert hits[0].score == pytest.approx(1, abs=0.02)
    exact = PictureSearch(tmp_path / "e", built, device=CPU, exact=True)
    for ours, other in zip(hits, exact.by_picture(encode(picture(9)), 3), strict=True):
        assert ours.score == pytest.approx(other.score, abs=1e-4)


def test_another_model_and_other_weights_are_refused(folder, built, tmp_path):
    other = build_tiny(tmp_path, "siglip")
    with pytest.raises(UserError, match="was made by another model, or other weights: the image"):
        PictureSearch(folder, other, device=CPU)
    changed = build_tiny(tmp_path)
    with torch.no_grad():
        changed.encoder.clip.token_embedding.weight[5, 3] += 1
    with pytest.raises(UserError, match="the text towers differ; name the run_dir"):
        PictureSearch(folder, changed, device=CPU)


def copy_folder(folder, to, **changes):
    """The folder again, with other words in its source."""
    import shutil

    shutil.copytree(folder, to)
    source = json.loads((to / "source.json").read_text())
    (to / "source.json").write_text(json.dumps(source | changes))
    return to


def pictures_of(folder, built, shards=None):
    found = PictureSearch(folder, built, device=CPU)
    return ShardPictures(found.rows, built.pictures, shards=shards, cache=CacheSettings())


def test_copies_of_pictures_are_small_and_hold_nothing_but_pixels(folder, shards, built, tmp_path):
    copies = pictures_of(folder, built)
    media_type, content = copies.copy(8)
    assert media_type == "image/png"
    assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(picture(8))).all()
    assert copies.copy(8)[1] is content  # remembered
    with pytest.raises(UserError, match="row"):
        copies.copy(-1)
    from dist_siglip.data.samples.picture import EncodedPicture
    from dist_siglip.data.samples.picture_policy import PicturePolicy
    from dist_siglip.evaluation.search.pictures import small_copy

    large = Image.effect_noise((3000, 1000), 40).convert("RGB")
    secret = Image.Exif()
    secret[0x010E] = "a secret place"
    data = encode(large, "JPEG", exif=secret, comment=b"a secret place")
    media_type, content = small_copy(EncodedPicture(data, PicturePolicy()))
    assert media_type == "image/jpeg"
    assert Image.open(io.BytesIO(content)).size == (448, 149)
    assert b"secret" not in content


def test_rows_that_are_not_finite_are_told(shards, built, tmp_path):
    folder = embedded(shards, built, tmp_path / "e")
    file = next((folder / "img_emb").iterdir())
    rows = np.load(file)
    rows[0, 0] = np.nan
    np.save(file, rows)
    search = PictureSearch(folder, built, device=CPU)
    with pytest.raises(UserError, match="is damaged: it holds numbers that are not finite"):
        search.by_text("a pair", 3)


def test_shards_that_moved_are_named_and_others_are_refused(folder, shards, built, tmp_path):
    moved = copy_folder(folder, tmp_path / "moved", shards=[str(tmp_path / "gone.tar")] * 4)
    with pytest.raises(UserError, match="say where the pictures are now with --shards"):
        pictures_of(moved, built)
    assert pictures_of(moved, built, str(Path(shards[0]).parent)).copy(3)[0] == "image/png"
    others = write_shards(tmp_path / "others", (7, 1, 12, 6))
    with pytest.raises(UserError, match="shards are not those that index"):
        pictures_of(moved, built, others)
    # A folder that names a file which is no shard gets nothing of it.
    secret = tmp_path / "secret.tar"
    secret.write_text("a secret" * 1000)
    named = copy_folder(folder, tmp_path / "named", shards=[str(secret)] * 4)
    with pytest.raises(UserError) as error:
        pictures_of(named, built)
    assert "a secret" not in str(error.value)


def test_metadata_that_name_other_samples_get_no_picture(folder, built, tmp_path):
    from pyarrow import parquet, table

    copied = copy_folder(folder, tmp_path / "e")
    file = copied / "metadata" / "metadata_0.parquet"
    content = parquet.read_table(file).to_pydict()
    parquet.write_table(table(content | {"place": [7] * 7}), file)
    with pytest.raises(BadSampleError, match="a sample that the shard does not hold"):
        pictures_of(copied, built).copy(0)
    parquet.write_table(table({**content, "place": content["place"]}).slice(0, 3), file)
    with pytest.raises(UserError, match="describes 3 rows of 7"):
        pictures_of(copied, built).copy(0)


def test_columns_and_rotations_other_than_those_of_the_folder_are_refused(shards, built, tmp_path):
    out = embedded(shards, built, tmp_path / "pca", dim=4, rotate="pca")
    file = tmp_path / "a.safetensors"
    file.write_bytes((out / "rotation.safetensors").read_bytes())
    source = {**SOURCE, "rotation": str(file)}
    settings = EmbedSettings(workers=0, device="cpu", dtype="float32", dim=4, rotate=str(file))
    embed_shards(table_of(shards), built, tmp_path / "named", settings, source=source)
    turned = PictureSearch(tmp_path / "named", built, device=CPU)
    assert turned.by_picture(encode(picture(9)), 1)[0].score == pytest.approx(1, abs=1e-4)
    file.write_bytes((out / "rotation.safetensors").read_bytes() + b"\0")
    with pytest.raises(UserError, match="is not the file that index"):
        PictureSearch(tmp_path / "named", built, device=CPU)
    stated = json.loads((out / "embed.json").read_text())
    (out / "embed.json").write_text(json.dumps(stated | {"dim": 5}))
    with pytest.raises(UserError, match="is damaged: its rows have 4 columns"):
        PictureSearch(out, built, device=CPU)
    (out / "embed.json").write_text(json.dumps(stated | {"max_image_pixels": "many"}))
    with pytest.raises(UserError, match="is damaged"):
        PictureSearch(out, built, device=CPU)


def test_credentials_of_shards_are_for_the_user_alone(shards, tmp_path):
    table = table_of(shards)
    for number, prefix in enumerate(("", "https://user:secret@host/")):
        (tmp_path / str(number)).mkdir()
        moved = dataclasses.replace(table, shards=(f"{prefix}a.tar",) * len(COUNTS))
        write_source(tmp_path / str(number), moved, {})
    (tmp_path / "plain").touch()
    modes = [(tmp_path / each).stat().st_mode & 0o777 for each in ("0/source.json", "plain")]
    assert modes[0] == modes[1]
    assert (tmp_path / "1" / "source.json").stat().st_mode & 0o777 == 0o600


def test_the_pictures_of_a_query_are_decoded_as_those_of_the_folder(shards, built, tmp_path):
    apply = dataclasses.replace(built, pictures=built.pictures.changed(transparency="drop"))
    settings = EmbedSettings(
        workers=0,
        device="cpu",
        max_image_pixels=4321,
        formats=("png", "bmp"),
        intensity_window=(5.0, 9.0),
    )
    out = tmp_path / "e"
    policy = settings.pictures(apply.pictures)
    source = {**SOURCE, "pictures": dataclasses.asdict(policy)}
    embed_shards(table_of(shards), apply, out, settings, source=source)
    found = PictureSearch(out, built, device=CPU).built.pictures
    assert found == policy
    assert (found.transparency, found.max_image_pixels) == ("drop", 4321)
    assert (found.formats, found.intensity_window) == (("png", "bmp"), (5.0, 9.0))
    for name, value in (("formats", 3), ("intensity_window", ["a", 1]), ("transparency", [])):
        stated = json.dumps(
            {**json.loads((out / "source.json").read_text()), "pictures": {name: value}}
        )
        (out / "source.json").write_text(stated)
        (out / "embed.json").write_text(
            json.dumps({**json.loads((out / "embed.json").read_text()), name: value})
        )
        with pytest.raises(UserError, match="is damaged"):
            PictureSearch(out, built, device=CPU)
