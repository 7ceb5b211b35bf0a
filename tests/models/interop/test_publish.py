"""Pushes of a folder to a stand-in of the hub, and the head of a card as the hub reads it."""

import pytest

from dist_siglip.errors import UserError
from dist_siglip.models.interop.publish import Card, Result, check_push, push_folder, write_card
from tests.support.exports import built_from
from tests.support.hubs import serve_repositories
from tests.support.tiny_models import ARCHITECTURES

hub = pytest.importorskip("huggingface_hub")


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
    ("place", "status"),
    [("repos/create", 401), ("/lfs/", 403), ("/commit/", 403), ("/commit/", 500)],
)
def test_what_the_hub_refuses_is_told_in_one_line(place, status, repositories, folder):
    repositories.refused[place] = status
    with pytest.raises(UserError, match=r"push \(me/model\) failed") as caught:
        push_folder(folder, "me/model")
    assert "\n" not in str(caught.value)
    assert str(status) in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert repositories.commits == []


def test_what_is_missing_is_told_before_anything_is_asked(repositories, folder, monkeypatch):
    for name in ("model", "a/b/c", "-x/model", "me/mo del", "https://hf.co/me/model"):
        with pytest.raises(UserError, match="must be ORG/NAME"):
            check_push(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token that may write; run hf auth login"):
        push_folder(folder, "me/model")
    assert repositories.asked == []


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
