"""What sentence-transformers reads is the model that was exported."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.interop import to_transformers
from dist_siglip.models.interop.export import export_model
from tests.support.exports import (
    CAPTIONS,
    NEEDS_TRANSFORMERS_5,
    built_from,
    features_of,
    picture,
    pixels_of,
    prepared,
)
from tests.support.hugging_face import write_folder
from tests.support.naflex import write_models
from tests.support.tiny_models import ARCHITECTURES

pytestmark = [pytest.mark.e2e, NEEDS_TRANSFORMERS_5]

package = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed"
)
LINES = [*CAPTIONS, "", "  DON\u2019T  stop "]


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def pair(request, tmp_path_factory):
    """A model, and its export as its own package loads it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        built = built_from(ARCHITECTURES["clip"], folder)
    else:
        write_folder(folder, request.param)
        built = prepared(build_dual_encoder(f"local-dir:{folder}"))
    done = export_model(built, folder / "out", to="sentence-transformers")
    assert done.largest_difference <= 1e-5
    return built, folder / "out", package.SentenceTransformer(str(folder / "out"), device="cpu")


def test_embeddings_are_equal(pair):
    built, _, model = pair
    pictures = [
        picture(i, size) for i, size in enumerate([(70, 50), (33, 40), (90, 180), (64, 64)])
    ]
    pixels = torch.cat([pixels_of(built, each) for each in pictures])
    images, texts = features_of(built, pixels, LINES)
    found = model.encode(LINES, convert_to_tensor=True)
    torch.testing.assert_close(found, texts, rtol=0, atol=1e-5)
    found = model.encode(pictures, convert_to_tensor=True)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-5)
    scores = model.similarity(model.encode(pictures), model.encode(LINES))
    torch.testing.assert_close(scores, images @ texts.T, rtol=0, atol=1e-5)


def test_it_is_saved_again_as_it_was(pair, tmp_path):
    built, _, model = pair
    model.save_pretrained(str(tmp_path / "again"))
    again = package.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    _, texts = features_of(built, pixels_of(built, picture()), LINES)
    torch.testing.assert_close(
        again.encode(LINES, convert_to_tensor=True), texts, rtol=0, atol=1e-5
    )


def test_the_same_folder_is_one_of_transformers_and_of_ours(pair):
    built, folder, _ = pair
    again = build_dual_encoder(f"local-dir:{folder}")
    pixels = pixels_of(built, picture())
    for ours, theirs in zip(features_of(built, pixels), features_of(again, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert again.start_bias == pytest.approx(built.start_bias, rel=1e-6)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    model, weights = write_models(tmp_path)
    flexible = build_dual_encoder(model, weights, num_patches=64)
    with pytest.raises(UserError, match="takes pictures of one size only"):
        export_model(flexible, tmp_path / "out", to="sentence-transformers")
    monkeypatch.setattr(to_transformers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "dist-siglip\[sentence-transformers\]"'):
        export_model(flexible, tmp_path / "out", to="sentence-transformers")
