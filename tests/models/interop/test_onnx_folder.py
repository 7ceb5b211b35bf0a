"""What onnxruntime computes is what the exported model computes."""

import json
import shutil

import numpy as np
import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.interop import to_onnx as onnx_folder
from dist_siglip.models.interop.export import export_model
from tests.support.exports import (
    BIAS,
    CAPTIONS,
    SCALE,
    built_from,
    features_of,
    picture,
    pixels_of,
    prepared,
)
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.e2e

onnxruntime = pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def pair(request, tmp_path_factory):
    """A model and its export; the SigLIPs come from transformers with their tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        built = built_from(ARCHITECTURES["clip"], folder)
    else:
        write_folder(folder, request.param)
        built = prepared(build_dual_encoder(f"local-dir:{folder}"))
    export_model(built, folder / "out", to="onnx")
    return built, folder / "out"


def run(folder, name, rows):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(["features"], {given.name: rows.numpy()})[0])


def test_features_are_equal_for_any_number_of_rows(pair):
    built, folder = pair
    for count in (1, 3):
        pixels = torch.cat([pixels_of(built, picture(i)) for i in range(count)])
        images, texts = features_of(built, pixels, CAPTIONS[:count])
        tokens = built.tokenizer(CAPTIONS[:count])
        torch.testing.assert_close(run(folder, "image", pixels), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(folder, "text", tokens), texts, rtol=0, atol=1e-5)


def test_tokens_are_equal_without_transformers(pair):
    built, folder = pair
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    captions = [*CAPTIONS, "", "one!! ! it\u2019s DON'T"]
    found = np.array([row.ids for row in tokenizer.encode_batch(captions)])
    assert (found == built.tokenizer(captions).numpy()).all()


def test_what_else_is_needed_is_in_one_file(pair):
    built, folder = pair
    said = json.loads((folder / "dual_encoder.json").read_text())
    assert (said["logit_scale"], said["logit_bias"]) == (SCALE, BIAS)
    assert said["image_size"] == [built.image_size] * 2
    assert tuple(said["mean"]) == built.mean
    assert tuple(said["std"]) == built.std
    assert (said["interpolation"], said["resize_mode"]) == (built.interpolation, built.resize_mode)
    assert said["context_length"] == built.context_length


def test_the_graphs_name_no_path(pair):
    for path in pair[1].iterdir():
        assert b".py" not in path.read_bytes(), path.name


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "_LARGEST_FILE_BYTES", 0)
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    export_model(built, tmp_path / "out", to="onnx")
    assert (tmp_path / "out" / "text.onnx.data").stat().st_size > 2**20
    tokens = built.tokenizer(CAPTIONS)
    with torch.no_grad():
        ours = built.encoder.encode_text(tokens)
    torch.testing.assert_close(run(tmp_path / "out", "text", tokens), ours, rtol=0, atol=1e-5)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "_PACKAGES", ("onnx", "no_such_package"))
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    with pytest.raises(UserError, match=r"needs no_such_package; run: pip install"):
        export_model(built, tmp_path / "out", to="onnx")


def test_a_tower_that_cannot_become_a_graph_is_refused_in_one_line(tmp_path):
    vision = {
        "image_size": 64,
        "timm_model_name": "vit_relpos_small_patch16_224",
        "timm_proj": "linear",
    }
    architecture = {**ARCHITECTURES["clip"], "vision_cfg": vision}
    built = built_from(architecture, tmp_path)
    with pytest.raises(UserError, match="the tower that takes pixels into a graph") as caught:
        export_model(built, tmp_path / "out", to="onnx")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


LINES = [*CAPTIONS, "three cats", "a green door", "rain in the hills"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_keeps_the_direction_of_features(precision, pair, tmp_path):
    built, whole = pair
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    onnx_folder.lower_precision(out, precision)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    pixels = torch.cat([pixels_of(built, picture(i)) for i in range(len(LINES))])
    images, texts = features_of(built, pixels, LINES)
    for name, rows, ours in (
        ("image", pixels, images),
        ("text", built.tokenizer(LINES), texts),
    ):
        found = run(out, name, rows)
        assert found.dtype == torch.float32
        cosines = (found * ours).sum(1)
        assert cosines.min() > (0.999 if precision == "fp16" else 0.9), (name, cosines)
        assert not torch.equal(found, ours)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(LINES)), rtol=0, atol=2e-3)
        one = run(out, name, rows[:1])  # any number of rows
        torch.testing.assert_close(one, found[:1], rtol=0, atol=2e-2)
        before, after = (bytes_of_matrices(folder / f"{name}.onnx") for folder in (whole, out))
        # Names and operations are most of a file of towers as small as these. In int8 the
        # convolution of patches stays, which is a large part of the image tower.
        most = 0.5 if precision == "fp16" else {"image": 0.7, "text": 0.26}[name]
        assert after <= most * before, (name, after / before)


def bytes_of_matrices(path):
    """What the weights of two and more dimensions take."""
    onnx = pytest.importorskip("onnx")
    values = onnx.load(path).graph.initializer
    return sum(onnx.numpy_helper.to_array(each).nbytes for each in values if len(each.dims) > 1)


def test_int8_graphs_multiply_integers_and_take_tokens_of_32_bits(tmp_path):
    onnx = pytest.importorskip("onnx")
    built, out = built_from(ARCHITECTURES["clip"], tmp_path), tmp_path / "out"
    done = export_model(built, out, to="onnx", precision="int8", token_type="int32")
    for name in ("image", "text"):
        graph = onnx.load(out / f"{name}.onnx").graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("MatMulInteger") >= 4, (name, kinds)  # of a block: in, out, two of MLP
        left = [value for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT]
        assert not any(sorted(value.dims) == [16, 64] for value in left), name
    said = json.loads((out / "export.json").read_text())
    assert (said["precision"], said["token_type"]) == ("int8", "int32")
    assert said["lowered"]["lowest_cosine"] == done.lowered["lowest_cosine"]
    assert "compute in int8" in (out / "README.md").read_text()
    assert json.loads((out / "dual_encoder.json").read_text())["token_type"] == "int32"
    tokens = built.tokenizer(CAPTIONS)
    with torch.no_grad():
        ours = built.encoder.encode_text(tokens)
    assert (run(out, "text", tokens.int()) * ours).sum(1).min() > 0.9


def test_lowered_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "_LARGEST_FILE_BYTES", 0)
    built, whole = built_from(ARCHITECTURES["clip"], tmp_path), tmp_path / "whole"
    whole.mkdir()
    onnx_folder.write_onnx(built, whole)
    tokens = built.tokenizer(CAPTIONS)
    with torch.no_grad():
        ours = built.encoder.encode_text(tokens)
    for precision in ("fp16", "int8"):
        out = tmp_path / precision
        shutil.copytree(whole, out)
        onnx_folder.lower_precision(out, precision)
        assert (out / "text.onnx.data").stat().st_size > 2**18
        assert (out / "text.onnx").stat().st_size < 2**18
        assert (run(out, "text", tokens) * ours).sum(1).min() > 0.9


def test_a_feature_that_half_precision_turns_is_refused(tmp_path, monkeypatch):
    built = built_from(ARCHITECTURES["clip"], tmp_path)

    def read_turned(*arguments):
        reader = onnx_folder.read_onnx(*arguments)
        return reader._replace(encode_image=lambda images: -reader.encode_image(images))

    # By its name: the reader of the lowered graphs; that of fp32 stands in the table of forms.
    monkeypatch.setattr("dist_siglip.models.interop.export.read_onnx", read_turned)
    with pytest.raises(UserError, match=r"precision \(fp16\) turns a feature"):
        export_model(built, tmp_path / "out", to="onnx", precision="fp16")
    assert not (tmp_path / "out").exists()


def test_precision_is_of_onnx_alone(tmp_path):
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    for wrong in ({"precision": "int8"}, {"token_type": "int32"}):
        with pytest.raises(UserError, match="is of onnx, not of safetensors; leave it out"):
            export_model(built, tmp_path / "out", to="safetensors", **wrong)
