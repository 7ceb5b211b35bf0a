"""Pushes of a folder to a stand-in of the hub, and the head of a card as the hub reads it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from dist_siglip.errors import OutageError, UserError
from dist_siglip.models.interop.export import export_model
from dist_siglip.models.interop.publish import Card, Result, check_push, push_folder, write_card
from tests.support.exports import built_from, features_of, picture, pixels_of
from tests.support.hubs import serve_repositories
from tests.support.tiny_models import ARCHITECTURES

hub = pytest.importorskip("huggingface_hub")

# Of what the lines of a card leave, the features of "two dogs".
FEATURES = {
    "open_clip": 'F.normalize(model.encode_text(tokenizer(["two dogs"])), dim=-1)',
    "hf": "F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)",
    "sentence-transformers": "torch.from_numpy(texts)",
    "safetensors": 'built.encoder.eval().encode_text(built.tokenizer(["two dogs"]))',
    "onnx": "torch.from_numpy(texts)",
}


@pytest.fixture
def repositories(monkeypatch):
    """The stand-in, where huggingface_hub looks for the hub."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    with serve_repositories() as state:
        monkeypatch.setattr(hub.constants, "ENDPOINT", state.url)
        yield state


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "export"
    (found / "1_Normalize").mkdir(parents=True)
    (found / "README.md").write_text("---\nlicense: mit\n---\n\nwords\n")
    (found / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (found / "1_Normalize" / "config.json").write_text("{}")
    return found


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_all_files_arrive_in_one_commit(repositories, folder):
    address = push_folder(folder, "me/model")
    assert address == f"{repositories.url}/me/model/commit/{'1' * 40}"
    assert repositories.commits == [("me/model", "main", contents(folder))]
    assert repositories.private == {"me/model": False}
    assert {token for token in repositories.tokens if token} == {"Bearer hf_SECRET"}
    push_folder(folder, "me/model")
    assert len(repositories.commits) == 2


def test_a_branch_is_made_and_a_repository_is_private(repositories, folder):
    push_folder(folder, "me/model", private=True, revision="v2")
    assert repositories.private == {"me/model": True}
    assert ("POST", "/api/models/me/model/branch/v2") in repositories.asked
    assert [branch for _, branch, _ in repositories.commits] == ["v2"]


def test_nothing_private_goes_to_a_public_repository(repositories, folder):
    repositories.private["me/model"] = False
    with pytest.raises(UserError, match="is public already, so nothing was pushed"):
        push_folder(folder, "me/model", private=True)
    assert repositories.commits == []
    assert not any("preupload" in place for _, place in repositories.asked)


@pytest.mark.parametrize(
    ("place", "status", "kind", "left"),
    [
        ("repos/create", 401, UserError, "nothing was pushed"),
        ("repos/create", 429, OutageError, "nothing was pushed"),
        ("/preupload/", 403, UserError, "no file was pushed; the repository was made"),
        ("/lfs/", 403, UserError, "no file was pushed; the repository was made"),
        ("/commit/", 403, UserError, "no file was pushed"),
        ("/commit/", 500, OutageError, "no file was pushed, or all if the hub's answer was lost"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    place, status, kind, left, repositories, folder, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repositories.refused[place] = (status, "not with hf_SECRET")
    with pytest.raises(kind, match=r"push \(me/model\) failed") as caught:
        push_folder(folder, "me/model")
    assert "\n" not in str(caught.value)
    assert str(status) in str(caught.value)
    assert left in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert repositories.commits == []


def test_a_commit_whose_answer_is_lost_is_told_as_that(repositories, folder):
    repositories.refused["/commit/"] = None
    with pytest.raises(
        OutageError, match=r"or all if the hub's answer was lost; look at its commits"
    ):
        push_folder(folder, "me/model")
    assert repositories.commits == [("me/model", "main", contents(folder))]


def test_a_licence_that_the_hub_does_not_know_makes_no_repository(repositories, folder):
    with pytest.raises(
        UserError, match=r"license \(mitt\) is refused by the hub: .*must be one of"
    ):
        check_push("me/model", "mitt")
    check_push("me/model", "mit")
    (folder / "README.md").write_text("---\nlicense: mitt\n---\n\nwords\n")
    with pytest.raises(UserError, match=r"failed, nothing was pushed: .*must be one of"):
        push_folder(folder, "me/model")
    assert repositories.private == {}


def test_what_is_missing_is_told_before_anything_is_asked(repositories, folder, monkeypatch):
    for name in ("model", "a/b/c", "-x/model", "me/mo del", "https://hf.co/me/model"):
        with pytest.raises(UserError, match="must be ORG/NAME"):
            check_push(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token that may write; run hf auth login"):
        push_folder(folder, "me/model")
    assert repositories.asked == []


def test_a_hub_that_cannot_be_reached_is_told(repositories, monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutageError, match=r"push \(me/model\) cannot ask the hub, so nothing was"):
        check_push("me/model")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot ask the hub, so nothing was .*HF_HUB_OFFLINE"):
        check_push("me/model")


def test_a_card_is_what_the_hub_reads(tmp_path):
    card = Card(
        name="b16",
        licence="apache-2.0",
        datasets=("me/pairs",),
        base_model="google/siglip2-base-patch16-224",
        results=(Result("image-text-retrieval", "val", {"image_to_text_recall@1": 0.5}),),
        sections="## Data\n\nwords",
    )
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    text = write_card(built, card, "hf", {"largest_difference": 1e-7})
    read = hub.ModelCard(text)
    assert (read.data.license, read.data.library_name) == ("apache-2.0", "transformers")
    assert read.data.pipeline_tag == "zero-shot-image-classification"
    assert read.data.datasets == ["me/pairs"]
    assert read.data.base_model == "google/siglip2-base-patch16-224"
    assert read.data.model_name == "b16"
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == (
        "recall",
        "image_to_text_recall@1",
        0.5,
    )
    assert (result.task_type, result.dataset_name) == ("image-text-retrieval", "val")
    assert "AutoModel.from_pretrained" in read.text
    assert "## Data" in read.text
    assert "23.5 * cosine + (-12.25)" in read.text


def test_a_licence_is_stated_or_said_to_be_missing(tmp_path):
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    read = hub.ModelCard(write_card(built, Card(), None, {}))
    assert read.data.license == "other"
    assert "None was stated" in read.text
    assert read.data.eval_results is None
    for wrong in ("", "Apache 2.0", "mit\nother: x"):
        with pytest.raises(UserError, match=r"license .* must be an identifier"):
            Card(licence=wrong)


def test_names_cannot_break_a_card(tmp_path):
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    name = "a <script> [x](http://y) | b"
    text = write_card(built, Card(name=name, results=(Result("t", name, {"a": 1.0}),)), None, {})
    assert "# a \\<script> \\[x](http://y) \\| b\n" in text
    assert hub.ModelCard(text).data.model_name == name


@pytest.mark.e2e
def test_the_lines_of_a_card_load_what_was_pushed(repositories, tmp_path):
    for package in ("onnxruntime", "onnxscript", "sentence_transformers", "tokenizers"):
        pytest.importorskip(package)
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    picture().save(tmp_path / "dogs.jpg")
    lines = ["import torch", "import torch.nn.functional as F", "found = {}"]
    for form, features in FEATURES.items():
        out = tmp_path / form
        options = {"token_type": "int32"} if form == "onnx" else {}
        export_model(built, out, to=form, card=Card(repository=f"me/{form}"), **options)
        for path in out.rglob("*"):
            assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
        push_folder(out, f"me/{form}")
        text = (out / "README.md").read_text()
        lines += re.findall("```python\n(.*?)```", text, re.DOTALL)
        lines.append(f"with torch.no_grad():\n    found[{form!r}] = {features}")
    lines.append("torch.save(found, 'found.pt')")
    script = tmp_path / "lines.py"
    script.write_text("\n".join(lines))
    hubs = {"HF_ENDPOINT": repositories.url, "HF_HOME": str(tmp_path / "cache")}
    environment = {**os.environ, **hubs, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(  # the address of the hub is read at import
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"/me/hf/resolve/{'1' * 40}/model.safetensors" in dict.fromkeys(
        place for _, place in repositories.asked
    )
    _, texts = features_of(built, pixels_of(built, picture()), ["two dogs"])
    for form, features in torch.load(tmp_path / "found.pt").items():
        torch.testing.assert_close(features, texts, rtol=0, atol=1e-5, msg=form)
