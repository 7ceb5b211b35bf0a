"""Recipes of several fits, one after the other: each goes on from the weights of the one before.

Sizes are small and everything else is as the files say. The features of a stage before its first
step are those of the stage before, but for positions, which are resampled by hand here.
"""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from torch.nn import functional

from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import Preprocessing, evaluation_transform
from dist_siglip.models import build_dual_encoder
from dist_siglip.runs import RunFolder, newest_sound_checkpoint
from tests.project.test_recipes import shrunk
from tests.support.forked_runs import run_forked
from tests.support.tiny_models import TEXT, VIT, write_config

STAGES = Path(__file__).parents[2] / "configs/stages"
PATCH = VIT["patch_size"]
LAYOUTS = {
    "clipa_b16": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT},
    # As ViT-L-14-CLIPA, with the tokenizer at hand.
    "progressive_l14": {
        "embed_dim": 8,
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"},
    },
}
NUM_VAL = 16
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_handwriting_shards(
        tmp_path_factory.mktemp("data"),
        num_train_pairs=40,
        num_val_pairs=NUM_VAL,
        num_train_shards=2,
        image_size=48,
    )


def chain(name):
    return sorted(STAGES.glob(f"{name}_[0-9].yaml"))


def kept(run, step):
    with np.load(run.kept_evaluation(step), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]).float() for name in file.files}


def resampled(old, grid):
    """Positions of patches on a grid of another size, that of the class as it is."""
    side = round((len(old) - 1) ** 0.5)
    patches = old[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    bigger = functional.interpolate(
        patches, (grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([old[:1], bigger[0].permute(1, 2, 0).reshape(grid * grid, -1)])


def stretched(old, length, first):
    """The first positions as they are, the others on straight lines through the old ones."""
    if length == len(old):
        return old
    rows = [old[i] for i in range(first)]
    for i in range(first, length):
        place = first + (i - first) * (len(old) - first) / (length - first)
        below = min(int(place), len(old) - 2)
        rows.append(old[below] + (place - below) * (old[below + 1] - old[below]))
    return torch.stack(rows)


def network_after(state, layout, recipe):
    """open_clip's own network of the next sizes, around the weights of a stage."""
    model = recipe["model"]
    vision = {**layout["vision_cfg"], "image_size": model["image_size"]}
    text = {**layout["text_cfg"], "context_length": model["context_length"]}
    network = open_clip.CLIP(layout["embed_dim"], vision, text)
    state = dict(state)
    for name, change in (
        ("visual.positional_embedding", lambda old: resampled(old, model["image_size"] // PATCH)),
        (
            "positional_embedding",
            lambda old: stretched(old, model["context_length"], model.get("kept_positions", 0)),
        ),
    ):
        state[name] = change(state[name])
    missing = network.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) <= {"logit_scale", "logit_bias", "attn_mask"}
    assert not missing.unexpected_keys
    return network.eval()


def towers_of(run):
    content = torch.load(newest_sound_checkpoint(run), weights_only=True)["state_dict"]
    prefix = "towers.clip."
    found = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    assert found
    return found


def encoded(network, shards, layout_file, recipe):
    """Features of the validation pairs."""
    sizes = {name: recipe["model"][name] for name in ("image_size", "context_length")}
    inputs = Preprocessing.of(build_dual_encoder(str(layout_file), **sizes))
    table = build_pair_table(list(shards.val), image_extensions=("png", "jpg"))
    data = PairDataset(table, evaluation_transform(inputs), seed=0, pictures=PicturePolicy())
    samples = [data[StreamPosition(0, i, i)] for i in range(NUM_VAL)]
    pixels = torch.stack([sample.image for sample in samples])
    with torch.no_grad():
        return (
            network.encode_image(
                ImageNormalizer(inputs.mean, inputs.std).pixels(pixels), normalize=True
            ),
            network.encode_text(
                inputs.tokenizer([sample.caption for sample in samples]), normalize=True
            ),
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_run_one_after_the_other_and_go_on_where_the_last_ended(name, shards, tmp_path):
    layout = LAYOUTS[name]
    layout_file = Path(write_config(tmp_path / "tiny.json", layout))
    previous, sizes = None, []
    for number, path in enumerate(chain(name)):
        recipe = yaml.safe_load(path.read_text())
        folder = tmp_path / str(number)
        options = shrunk(recipe, type("Parts", (), vars(shards) | {"folder": tmp_path}), folder)
        sizes.append(recipe["model"]["image_size"])
        recipe["model"]["image_size"] = size = 2 * PATCH * (number + 1)
        options += ["--model.image_size", str(size), "--trainer.precision", "32-true"]
        if previous is not None:
            # The file names the folder of the run before.
            assert recipe["model"]["pretrained"] == f"runs/{chain(name)[number - 1].stem}"
            options += ["--model.pretrained", str(previous.path)]
        done = run_forked("fit", "--config", path, *options)
        assert done.returncode == 0, done.stderr
        run = RunFolder(folder / "run")
        assert run.steps_with_checkpoint() == [2]
        if previous is not None:
            start = kept(run, 0)
            network = network_after(towers_of(previous), layout, recipe)
            images, texts = encoded(network, shards, layout_file, recipe)
            assert torch.allclose(start["image_features"], images, atol=1e-3)
            assert torch.allclose(start["text_features"], texts, atol=1e-3)
            # Captions of few tokens, or of as many positions as before, say what they said.
            end = kept(previous, 2)
            assert torch.allclose(start["text_features"], end["text_features"], atol=1e-3)
            assert not torch.allclose(start["image_features"], end["image_features"], atol=1e-3)
            # Positions in another order are another model.
            towers = towers_of(previous)
            towers["visual.positional_embedding"] = towers["visual.positional_embedding"].flip(0)
            other, _ = encoded(network_after(towers, layout, recipe), shards, layout_file, recipe)
            assert not torch.allclose(start["image_features"], other, atol=1e-3)
            trained = towers_of(run)["token_embedding.weight"]
            assert not torch.equal(trained, towers_of(previous)["token_embedding.weight"])
        previous = run
    assert len(sizes) >= 2
    assert sizes == sorted(sizes)
    assert all(size % int(name[-2:]) == 0 for size in sizes)  # whole patches


def test_every_stage_belongs_to_a_chain():
    assert sorted(STAGES.glob("*.yaml")) == sorted(path for name in LAYOUTS for path in chain(name))
