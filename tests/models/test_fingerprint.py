import torch

from dist_siglip.models.build import tower_fingerprint
from tests.support.embedding import build_tiny


def test_the_digest_of_a_tower_depends_on_its_weights_and_its_inputs_alone(tmp_path):
    built = build_tiny(tmp_path)
    image, text = (tower_fingerprint(built, tower) for tower in ("image", "text"))
    assert tower_fingerprint(build_tiny(tmp_path), "image") == image != text
    built.encoder.clip.visual.proj.data[0, 0] += 1
    assert tower_fingerprint(built, "image") != image
    assert tower_fingerprint(built, "text") == text
    built.encoder.clip.visual.proj.data[0, 0] -= 1
    object.__setattr__(built, "mean", (0.1, 0.2, 0.3))
    assert tower_fingerprint(built, "image") != image
    assert tower_fingerprint(built, "text") == text
    object.__setattr__(built, "context_length", 5)
    assert tower_fingerprint(built, "text") != text


def test_what_counts_in_training_only_leaves_the_digest_alone(tmp_path):
    built = build_tiny(tmp_path)
    first = tower_fingerprint(built, "image")
    built.architecture["vision_cfg"]["patch_dropout"] = 0.5
    assert tower_fingerprint(built, "image") == first


def test_half_precision_weights_have_a_digest_of_their_own(tmp_path):
    built = build_tiny(tmp_path)
    first = tower_fingerprint(built, "image")
    built.encoder.to(torch.bfloat16)
    assert tower_fingerprint(built, "image") != first
