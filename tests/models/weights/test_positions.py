"""Position embeddings of another length: the plain loops of their authors, other libraries."""

import logging

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.weights import stretch_positions
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config

LONG = {**ARCHITECTURES["clip"]}
LONG["text_cfg"] = {**LONG["text_cfg"], "context_length": 77}


def long_clip_positions(old):
    """248 of 77 rows, as Long-CLIP makes them: 20 are kept, between the others come three each."""
    old = old.double()
    rows = [old[i] for i in range(20)]
    for i in range(20, 76):
        rows += [old[i] + share / 4 * (old[i + 1] - old[i]) for share in range(4)]
    rows += [old[76] + share / 4 * (old[76] - old[75]) for share in range(4)]
    return torch.stack(rows)


def straight(old, length, kept):
    """Any length, row by row."""
    rows = [row.tolist() for row in old.double()]
    found = rows[:kept]
    step = (len(rows) - kept) / (length - kept)
    for i in range(kept, length):
        place = kept + (i - kept) * step
        lower = min(int(place), len(rows) - 2)
        found.append(
            [
                a + (place - lower) * (b - a)
                for a, b in zip(rows[lower], rows[lower + 1], strict=True)
            ]
        )
    return torch.tensor(found, dtype=torch.float64)


def test_20_of_77_are_kept_as_long_clip_does():
    old = torch.randn(77, 5)
    found = stretch_positions(old, 248, 20)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), long_clip_positions(old), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "kept"), [(12, 0), (30, 4), (9, 7), (6, 3), (8, 2)])
def test_any_length_is_stretched_in_a_straight_line(length, kept):
    old = torch.randn(8, 3, dtype=torch.float64)
    found = stretch_positions(old, length, kept)
    assert torch.equal(found[:kept], old[:kept])
    torch.testing.assert_close(found, straight(old, length, kept), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "kept"), [(12, 8), (6, 6), (12, -1)])
def test_more_than_there_are_cannot_be_kept(length, kept):
    with pytest.raises(UserError, match=rf"kept_positions \({kept}\) must be at least 0 and below"):
        stretch_positions(torch.randn(8, 3), length, kept)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A config with 77 positions, weights of it, and the features of captions by length."""
    folder = tmp_path_factory.mktemp("clip")
    torch.save(network_of(LONG).state_dict(), folder / "w.pt")
    return write_config(folder / "a.json", LONG), str(folder / "w.pt")


def features(built, num_words):
    captions = [" ".join(["dog"] * number) for number in num_words]
    with torch.no_grad():
        return built.encoder.eval().encode_text(built.tokenizer(captions))


def test_captions_of_up_to_20_tokens_keep_their_features(clip, caplog):
    caplog.set_level(logging.INFO)
    short = [0, 1, 5, 18]  # and two tokens around them
    before = build_dual_encoder(*clip)
    kept = build_dual_encoder(*clip, context_length=248, kept_positions=20)
    torch.testing.assert_close(features(kept, short), features(before, short), rtol=0, atol=1e-6)
    assert "the first 20 stay, and with them the features of captions of up to 20" in caplog.text
    assert features(kept, [200]).isfinite().all()
    moved = torch.cosine_similarity(features(kept, [40]), features(before, [40])).item()
    assert moved < 0.999
    with torch.no_grad():
        longest = long_clip_positions(before.encoder.clip.positional_embedding)
    torch.testing.assert_close(
        kept.encoder.clip.positional_embedding.detach().double(), longest, rtol=0, atol=1e-6
    )


def test_by_default_all_are_stretched_and_the_log_says_that_short_captions_move(clip, caplog):
    caplog.set_level(logging.INFO)
    before, after = build_dual_encoder(*clip), build_dual_encoder(*clip, context_length=248)
    cosines = torch.cosine_similarity(features(before, [1, 5]), features(after, [1, 5]))
    assert cosines.max() < 0.999
    assert "resized positional_embedding" in caplog.text
    assert "features of short captions move too, unless model.kept_positions" in caplog.text


def test_a_tower_that_reads_its_padding_is_said_to_move(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(network_of(ARCHITECTURES["siglip"]).state_dict(), tmp_path / "w.pt")
    model = write_config(tmp_path / "a.json", ARCHITECTURES["siglip"])
    build_dual_encoder(model, str(tmp_path / "w.pt"), context_length=16, kept_positions=4)
    assert "but this text tower reads its padding too: features of all captions move" in caplog.text


def test_a_negative_number_is_refused_even_where_nothing_is_stretched(clip):
    with pytest.raises(UserError, match=r"kept_positions \(-1\) must be >= 0"):
        build_dual_encoder(*clip, kept_positions=-1)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("size", [48, 24])
def test_images_of_another_size_are_those_of_transformers(kind, size, tmp_path):
    """open_clip's weights are resampled as open_clip does, which differs by some 1e-3."""
    torch.manual_seed(0)
    model = write_folder(tmp_path, kind)
    built = build_dual_encoder(f"local-dir:{tmp_path}", image_size=size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=images, interpolate_pos_encoding=True)
        found = built.encoder.eval().encode_image(images)
    expected = torch.nn.functional.normalize(getattr(theirs, "pooler_output", theirs), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
