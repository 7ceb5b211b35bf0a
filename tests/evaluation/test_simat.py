"""SIMAT's score: the authors' formula as a loop, and files that are not as they should be."""

import math
import re

import pytest
import torch

from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import Simat
from tests.support.arithmetic import WORDS, simat_queries, write_simat
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.processes import run_ranks
from tests.support.shards import tokenize

NUM_PICTURES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("simat")
    write_simat(made)
    return made


def expected_score(folder, is_test, strength, allow_self=False):
    """eval.py of facebookresearch/SIMAT, one query at a time."""
    transform = evaluation_transform(known_model().inputs)
    images = []
    for position in range(NUM_PICTURES):
        (path,) = (folder / "images").rglob(f"{100 + 7 * position}.jpg")
        pixels = transform(EncodedPicture(path.read_bytes(), PicturePolicy(max_image_pixels=10**6)))
        images.append(image_map(pixels[None])[0].double())
    words = {word: text_map(tokenize([word]))[0].double() for word in WORDS}
    judgements = torch.load(folder / "oscar_similarity_matrix.pt", weights_only=True)
    reached = possible = 0.0
    for picture, source, target, triplet, norm2, in_test in simat_queries(NUM_PICTURES):
        if in_test != is_test:
            continue
        point = images[picture] + strength * (words[target] - words[source])
        scores = [float(point @ image) for image in images]
        best = sorted(range(NUM_PICTURES), key=lambda i: -scores[i])[:5]
        answer = best[0] if best[0] != picture or allow_self else best[1]
        weight = 1 / math.sqrt(norm2)
        possible += weight
        reached += weight * bool(judgements[answer, triplet] > 0.5)
    return 100 * reached / possible


@pytest.mark.parametrize(("split", "strength"), [("dev", 1.0), ("test", 1.0), ("dev", 0.3)])
def test_the_score_is_that_of_the_authors_formula(folder, split, strength):
    result = Simat(str(folder), split=split, strength=strength).evaluate(known_model())
    expected = expected_score(folder, split == "test", strength)
    assert result.metrics["simat_score"] == pytest.approx(expected, abs=1e-9)
    assert 5 < expected < 95
    num_queries = 10 if split == "test" else 30
    assert result.details == {
        "queries": num_queries,
        "pictures": NUM_PICTURES,
        "split": split,
        "strength": strength,
    }


def test_a_picture_as_its_own_answer_would_be_another_score(folder):
    expected = expected_score(folder, False, 0.3)
    assert abs(expected_score(folder, False, 0.3, allow_self=True) - expected) > 1


def _evaluate(rank, world_size, folder):
    result = Simat(str(folder)).evaluate(known_model())
    path = next((folder / "broken" / "images").rglob("170.jpg"))  # the last rank's
    assert path.stat().st_size < 100
    try:
        Simat(str(folder / "broken")).evaluate(known_model())
    except UserError as error:
        return result, str(error)
    return result, "no error"


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_score_is_that_of_one_process_and_all_ranks_refuse_a_damaged_picture(
    folder, world_size
):
    if not (folder / "broken").exists():
        write_simat(folder / "broken")
        next((folder / "broken").rglob("170.jpg")).write_bytes(b"no picture")
    alone = Simat(str(folder)).evaluate(known_model())
    for result, refusal in run_ranks(_evaluate, world_size, folder):
        assert result == alone
        assert re.search(r"170\.jpg cannot be used", refusal)


def test_check_passes_what_can_be_evaluated(folder):
    Simat(str(folder)).check()


def _without_judgements(folder):
    (folder / "oscar_similarity_matrix.pt").unlink()


def _with_code(folder):
    torch.save(re.compile("a"), folder / "oscar_similarity_matrix.pt")


def _with_few_judgements(folder):
    torch.save(torch.zeros(3, 6), folder / "oscar_similarity_matrix.pt")


def _without_a_picture(folder):
    next(folder.rglob("107.jpg")).unlink()


def _without_column(folder):
    path = folder / "triplets.csv"
    path.write_text(path.read_text().replace("dataset_id", "place"))


def _with_a_gap(folder):
    path = folder / "triplets.csv"
    path.write_text(path.read_text().replace(",10\n", ",12\n").replace(",10\r\n", ",12\r\n"))


def _with_a_stranger(folder):
    path = folder / "transfos.csv"
    path.write_text(path.read_text().replace("1,135,", "1,13,"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_judgements, "has no oscar_similarity_matrix.pt; it is part of SIMAT"),
        (_with_code, "is no tensor that can be read safely"),
        (_with_few_judgements, "must be a matrix of 11 rows"),
        (_without_a_picture, "lacks 1 of 11 pictures, first 107.jpg"),
        (_without_column, "has no column 'dataset_id'; take the newest of SIMAT"),
        (_with_a_gap, "must hold every dataset_id from 0 to 10 once"),
        (_with_a_stranger, "transfos.csv is damaged: '13'"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_starts(tmp_path, damage, message):
    write_simat(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        Simat(str(tmp_path)).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, r"strength \(0.0\) of benchmark 'simat' must be above 0; use 1"),
        ({"split": "val"}, r"split \(val\) of benchmark 'simat' must be dev or test"),
        ({"name": "a/b"}, "must be letters, digits"),
    ],
)
def test_settings_out_of_range_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message):
        Simat(str(folder), **settings).check()


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no readable triplets.csv; give simat_db"):
        Simat(str(tmp_path / "nowhere")).check()
