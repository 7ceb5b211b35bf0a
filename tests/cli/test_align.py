"""dist-siglip align, in process: what it prints, which sides it takes, and mistakes in one line."""

import json

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dist_siglip.cli import main
from dist_siglip.metrics.alignment import estimate_alignment

SMALL = ["--num_rows=40", "--num_parts=2", "--k=4", "--svcca_dimensions=3"]


def arrays(count=90):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(count, 8)).astype(np.float32) + 0.5
    text = image @ generator.normal(size=(8, 8)).astype(np.float32)
    return image, text + generator.normal(size=(count, 8)).astype(np.float32)


def write_folder(path, order, towers=("image", "text")):
    """embeddings.parquet with the rows in another order, and their keys."""
    path.mkdir()
    columns = {"image_path": [f"k{row}" for row in order], "shard": ["s.tar"] * len(order)}
    for tower, rows in zip(("image", "text"), arrays(), strict=True):
        if tower in towers:
            values = pyarrow.array(rows[order].reshape(-1))
            columns[f"{tower}_embedding"] = pyarrow.FixedSizeListArray.from_arrays(values, 8)
    parquet.write_table(pyarrow.table(columns), path / "embeddings.parquet")
    return str(path)


@pytest.fixture
def files(tmp_path):
    image, text = arrays()
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "text.npy", text)
    return [str(tmp_path / "image.npy"), str(tmp_path / "text.npy")]


def run_json(capsys, *words):
    assert main(["align", *words, "--json=true"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_library(files, capsys):
    facts = run_json(capsys, *files, *SMALL, "--seed=3")
    for name, center in (("raw", False), ("centered", True)):
        expected = estimate_alignment(
            *map(torch.from_numpy, arrays()),
            center=center,
            num_rows=40,
            num_parts=2,
            k=4,
            svcca_dimensions=3,
            seed=3,
        )
        assert facts[name]["mean"] == expected.mean._asdict()
        assert facts[name]["chance_deviation"] == expected.chance_deviation._asdict()
    assert facts["matched_rows"] == facts["first_rows"] == 90


def test_one_folder_compares_its_two_towers(tmp_path, files, capsys):
    folder = write_folder(tmp_path / "out", np.arange(90))
    ours = run_json(capsys, folder, *SMALL)
    assert ours["raw"] == run_json(capsys, *files, *SMALL)["raw"]
    assert ours["first"].endswith("out (image)")
    assert ours["second"].endswith("out (text)")


def test_rows_of_two_folders_are_matched_by_key(tmp_path, capsys):
    order = np.random.default_rng(1).permutation(90)[:70]
    there = write_folder(tmp_path / "there", np.arange(90))
    here = write_folder(tmp_path / "here", order)
    facts = run_json(capsys, there, here, *SMALL)
    assert (facts["first_rows"], facts["second_rows"], facts["matched_rows"]) == (90, 70, 70)
    assert facts["raw"]["mean"]["mutual_knn"] == 1
    across = run_json(capsys, there, here, *SMALL, "--towers=[image,text]")
    assert 0.1 < across["raw"]["mean"]["mutual_knn"] < 1


def test_the_table_holds_every_measure_and_says_what_was_compared(files, capsys):
    assert main(["align", *files, *SMALL]) == 0
    shown = capsys.readouterr().out
    for measure in ("mutual_knn", "cycle_knn", "cka", "unbiased_cka", "cknna", "svcca"):
        assert f"│ {measure} " in shown
    assert "by chance" in shown
    assert "2 parts of 40" in " ".join(shown.split())


def test_features_of_sparse_autoencoders_are_matched_if_asked(files, capsys):
    options = ["--sparse.num_features=16", "--sparse.num_active=1", "--sparse.steps=60"]
    facts = run_json(capsys, *files, *SMALL, *options, "--sparse.batch_rows=32")["sparse"]
    assert facts["matched_correlation"] > facts["matched_correlation_by_chance"]
    assert 0 < facts["first_features"] <= 16
    assert run_json(capsys, *files, *SMALL).keys() == {
        "first",
        "second",
        "first_rows",
        "second_rows",
        "matched_rows",
        "raw",
        "centered",
    }


def test_a_number_that_is_none_is_null(files, capsys):
    facts = run_json(capsys, *files, "--num_rows=40", "--num_parts=1", "--k=4")
    assert facts["raw"]["deviation"]["cka"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.npy", "b.npy"], "embeddings (nowhere.npy) do not exist"),
        (["a", "b", "c"], "align compares two sets of embeddings, not 3; give two paths"),
        (["IMAGE"], "holds one set of embeddings; give a second path"),
        (["IMAGE", "IMAGE", "--towers=[image]"], "towers (['image']) must be two"),
        (["IMAGE", "IMAGE", "--k=90"], "k (90) must be from 1 to 89"),
        (["IMAGE", "IMAGE", "--k=1"], "CKNNA of 90 rows with k (1) is not defined"),
        (["IMAGE", "IMAGE", "--num_parts=0"], "num_parts (0) must be at least 1"),
        (["IMAGE", "IMAGE", "--device=abacus"], "device (abacus) cannot be used"),
        (["IMAGE", "IMAGE", "--sparse.steps=0"], "sparse.steps (0) must be at least 1"),
        (["IMAGE", "IMAGE", "--row_num=9"], "configuration key (row_num) is unknown"),
        ([], "embeddings"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(files, capsys, words, message):
    assert main(["align", *(files[0] if word == "IMAGE" else word for word in words)]) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint
    assert len(complaint.splitlines()) == 1
