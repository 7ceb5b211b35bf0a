import json

import open_clip
import pytest

from dist_siglip.errors import UserError
from dist_siglip.models.weight_source import resolve_model
from dist_siglip.runs import RunFolder
from dist_siglip.runs.checkpoints.io import AtomicCheckpointIO
from tests.support.tiny_models import ARCHITECTURES, write_config


def no_network(*args, **kwargs):
    raise FileNotFoundError("Failed to download file\n(offline)")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32"])
def test_built_in_name_gives_the_config_of_open_clip(name):
    source = resolve_model(name)

    assert source.architecture == open_clip.get_model_config("ViT-B-32")
    assert source.weights is None
    assert source.preprocessing["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert source.preprocessing["resize_mode"] == "shortest"


def test_disagreeing_tags_leave_the_default_preprocessing():
    means = {
        tuple(open_clip.get_pretrained_cfg("ViT-L-14", tag)["mean"])
        for tag in open_clip.list_pretrained_tags_by_model("ViT-L-14")
    }
    assert len(means) > 1
    assert resolve_model("ViT-L-14").preprocessing["mean"] == open_clip.OPENAI_DATASET_MEAN


def test_tag_is_fetched_and_brings_its_preprocessing(tmp_path, monkeypatch):
    fetched = []

    def fetch(published):
        fetched.append(published["hf_hub"])
        return str(tmp_path / "weights.safetensors")

    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    source = resolve_model("ViT-B-16-SigLIP", "webli")

    assert fetched == ["timm/ViT-B-16-SigLIP/"]
    assert source.weights == tmp_path / "weights.safetensors"
    assert source.preprocessing["mean"] == (0.5, 0.5, 0.5)


def test_tag_trained_with_another_activation_is_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda published: "weights.pt")
    resolve_model("ViT-B-32", "openai")
    assert "-quickgelu" in caplog.text


def test_local_file_of_a_siglip_model_keeps_siglip_preprocessing(tmp_path):
    (tmp_path / "mine.pt").touch()
    source = resolve_model("ViT-B-16-SigLIP", str(tmp_path / "mine.pt"))

    assert source.weights == tmp_path / "mine.pt"
    assert source.preprocessing["std"] == (0.5, 0.5, 0.5)
    assert source.preprocessing["resize_mode"] == "squash"


def test_config_is_a_copy():
    resolve_model("ViT-B-32").architecture["vision_cfg"]["layers"] = 1
    assert resolve_model("ViT-B-32").architecture["vision_cfg"]["layers"] == 12


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-61", None, r"model \(ViT-B-61\) is unknown; did you mean .*ViT-B-16"),
        ("vit-b-16-siglip", None, r"did you mean .*ViT-B-16-SigLIP"),
        ("zzzz", None, r"model \(zzzz\) is unknown; give a built-in open_clip name"),
        ("ViT-B-32", "opneai", r"pretrained \(opneai\) is unknown .* one of openai, laion400m"),
        ("ViT-M-32", "openai", r"the model has no tags; give a file path"),
        ("ViT-B-32", "no/such.pt", r"pretrained \(no/such.pt\) is not a file, nor the folder of"),
        ("no/such.json", None, r"model \(no/such.json\) is not a file"),
        ("local-dir:no/such", None, r"model \(local-dir:no/such\) names no folder"),
        ("local-dir:", None, "names no folder"),
        ("hf-hub:name", None, "hf-hub:ORGANISATION/REPOSITORY"),
        ("hf-hub:org/name", "openai", r"pretrained \(openai\) cannot be combined"),
    ],
)
def test_wrong_name_is_refused_with_its_remedy(model, pretrained, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(model, pretrained)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_run_names_its_newest_sound_checkpoint(tmp_path, caplog):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(UserError, match=r"pretrained \(.*run\) is a run without a checkpoint"):
        resolve_model("ViT-B-32", str(run.path))
    for step in (2, 4, 6):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, run.checkpoint(step))
    newest = bytearray(run.checkpoint(6).read_bytes())
    newest[len(newest) // 2] ^= 1
    run.checkpoint(6).write_bytes(newest)
    assert resolve_model("ViT-B-32", str(run.path)).weights == run.checkpoint(4)
    assert f"{run.checkpoint(6)} is damaged" in caplog.text
    assert resolve_model("ViT-B-32", str(run.path), with_weights=False).weights is None


def test_folder_without_prefix_is_pointed_out(tmp_path):
    with pytest.raises(UserError, match=f"local-dir:{tmp_path}"):
        resolve_model(str(tmp_path))


def test_unreachable_tag_and_hub_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    monkeypatch.setattr("dist_siglip.models.weight_source.download_pretrained_from_hf", no_network)
    of_transformers = "dist_siglip.models.interop.transformers_format"
    monkeypatch.setattr(f"{of_transformers}.snapshot_download", no_network)
    for model, pretrained in (("ViT-B-32", "openai"), ("hf-hub:org/name", None)):
        with pytest.raises(UserError, match=r"cannot be fetched .*\(offline\)") as caught:
            resolve_model(model, pretrained)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "must be an object"), ('{"embed_dim": 3}', "vision_cfg")],
)
def test_broken_config_is_refused(content, message, tmp_path):
    (tmp_path / "tiny.json").write_text(content)
    with pytest.raises(UserError, match=message):
        resolve_model(str(tmp_path / "tiny.json"))


def test_folder_needs_one_weights_file(tmp_path):
    with pytest.raises(UserError, match=r"open_clip_config.json does not exist"):
        resolve_model(f"local-dir:{tmp_path}")
    write_config(tmp_path / "open_clip_config.json", {"model_cfg": ARCHITECTURES["clip"]})
    with pytest.raises(UserError, match=r"found none"):
        resolve_model(f"local-dir:{tmp_path}")
    (tmp_path / "b.pt").touch()
    assert resolve_model(f"local-dir:{tmp_path}").weights == tmp_path / "b.pt"
    (tmp_path / "a.bin").touch()
    with pytest.raises(UserError, match=r"found a.bin, b.pt"):
        resolve_model(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    preferred = tmp_path / "open_clip_pytorch_model.bin"
    assert resolve_model(f"local-dir:{tmp_path}").weights == preferred


def test_bare_config_in_a_folder_is_read(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(ARCHITECTURES["clip"]))
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(f"local-dir:{tmp_path}").architecture == ARCHITECTURES["clip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "cannot be read: "),
        ("[]", "must be an object with embed_dim"),
        ('{"preprocess_cfg": [1]}', "preprocess_cfg .* must be an object whose mean is three"),
        ('{"preprocess_cfg": {"mean": [1, 2]}}', "whose mean is three finite numbers"),
        ('{"preprocess_cfg": {"mean": [1, 2, NaN]}}', "whose mean is three finite numbers"),
        ('{"preprocess_cfg": {"std": [1, 0, 1]}}', "whose std is three finite numbers above 0"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(text, message, tmp_path):
    if text.startswith("{"):
        text = json.dumps({"model_cfg": ARCHITECTURES["clip"]} | json.loads(text))
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(tmp_path / "model.json"))
    assert "\n" not in str(caught.value)
