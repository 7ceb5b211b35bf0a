"""No number that is none comes in with weights, by whatever way they come."""

import json
import math

import pytest
import safetensors.torch
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.reranker import (
    FusionConfig,
    FusionHead,
    read_head,
    token_shapes,
    write_head,
)
from dist_siglip.models.tuning import LoraSettings, TowerConfig
from dist_siglip.models.weights import read_weights
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.runs.checkpoints.sharded import write_sharded
from dist_siglip.training.callbacks import AtomicCheckpointIO
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.module.trained import load_trained
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module, weights_beside

CLIP = ARCHITECTURES["clip"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_an_entry_that_is_not_finite_is_found_and_named(value, dtype):
    tensors = {name: torch.ones(3, 4) for name in ("first", "second", "third")}
    tensors["second"][1, 2] = value
    tensors["third"][0, 0] = value
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    message = r"w\.pt: second is not finite in 1 of 12 entries, and so are 1 more tensors"
    with pytest.raises(UserError, match=message) as caught:
        refuse_not_finite(tensors, "w.pt")
    assert "\n" not in str(caught.value)


def test_infinities_of_both_signs_are_found():
    with pytest.raises(UserError, match="w is not finite in 2 of 2"):
        refuse_not_finite({"w": torch.tensor([math.inf, -math.inf])}, "w.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((100,), 60000.0, dtype=torch.float16),  # whose sum is no number of its type
        torch.full((4,), 3e38),
        torch.zeros(0, 3),
        torch.tensor(1.0),
        torch.arange(3),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.float8_e4m3fn),
    ],
)
def test_numbers_pass(tensor):
    refuse_not_finite({"w": tensor}, "w.pt")


def spoiled(state, name):
    state = {key: value.clone() for key, value in state.items()}
    state[name].view(-1)[0] = math.nan
    return state


def of_open_clip(folder, name="visual.proj"):
    state = spoiled(network_of(CLIP).state_dict(), name)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "w.pt")
    build_dual_encoder(write_config(folder / "a.json", CLIP), str(folder / "w.pt"))


def scale_of_open_clip(folder):
    of_open_clip(folder, "logit_scale")


def bias_of_siglip(folder):
    state = spoiled(network_of(ARCHITECTURES["siglip"]).state_dict(), "logit_bias")
    safetensors.torch.save_file(state, folder / "w.safetensors")
    build_dual_encoder(
        write_config(folder / "a.json", ARCHITECTURES["siglip"]), str(folder / "w.safetensors")
    )


def of_average(folder):
    state = network_of(CLIP).state_dict()
    torch.save(
        {"state_dict": state, "state_dict_ema": spoiled(state, "visual.proj")}, folder / "w.pt"
    )
    read_weights(folder / "w.pt")  # that is not what is taken
    read_weights(folder / "w.pt", average=True)


def of_transformers(folder, **options):
    model = write_folder(folder, "clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = math.nan
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    build_dual_encoder(f"local-dir:{folder}")


def of_transformers_in_several_files(folder):
    of_transformers(folder, max_shard_size="50KB")


def run_of(folder, spoil, sharded=False):
    """A run with one checkpoint, one parameter of which is spoiled."""
    model = write_config(folder / "a.json", CLIP)
    lora = TowerConfig(lora=LoraSettings(rank=2))
    module = SigLipModule(model, weights_beside(model), image_tower=lora, logits=LogitConfig())
    state = module.state_dict()
    (name,) = [key for key in state if key.endswith(spoil)]
    content = {"state_dict": spoiled(state, name), "global_step": 3, "optimizer_states": []}
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "step=00000003.ckpt"
    if sharded:
        write_sharded(content, path)
    else:
        AtomicCheckpointIO().save_checkpoint(content, path)
    settings = {"model": model, "image_tower": {"lora": {"rank": 2}}, "text_tower": {}}
    (run / "config.yaml").write_text(json.dumps({"model": settings}))
    load_trained(run_dir=str(run))


def of_an_adapter(folder):
    run_of(folder, "resblocks.0.mlp.c_fc.lora_A.default.weight")


def of_a_run(folder):
    run_of(folder, "clip.text_projection")


def of_a_sharded_run(folder):
    run_of(folder, "clip.text_projection", sharded=True)


def of_a_head(folder):
    built = build_dual_encoder(write_config(folder / "a.json", CLIP))
    shapes = token_shapes(built)
    head = FusionHead(shapes["image"], shapes["text"], FusionConfig(width=8, heads=2, layers=1))
    with torch.no_grad():
        head.match.weight[0, 0] = math.inf
    write_head(folder / "head.safetensors", head, built)
    read_head(folder / "head.safetensors", built)


def of_a_checkpoint_to_go_on_from(folder):
    model = write_config(folder / "a.json", ARCHITECTURES["siglip"])
    module = locked_module(model)
    trainer = fit(module, folder, batches_of(1))
    with torch.no_grad():
        module.towers.clip.text.text_projection.weight[0, 0] = math.nan
    trainer.save_checkpoint(folder / "last.ckpt")
    fit(locked_module(model), folder, batches_of(2), ckpt_path=folder / "last.ckpt")


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (of_open_clip, r"w\.pt: module\.visual\.proj is not finite in 1 of 128"),
        (scale_of_open_clip, r"w\.pt: module\.logit_scale is not finite"),
        (bias_of_siglip, r"w\.safetensors: logit_bias is not finite"),
        (of_average, r"w\.pt: visual\.proj is not finite"),
        (of_transformers, r"model\.safetensors: visual_projection\.weight is not finite"),
        (of_transformers_in_several_files, r"index\.json: visual_projection\.weight is not fin"),
        (of_an_adapter, r"\.ckpt: .*lora_A\.default\.weight is not finite"),
        (of_a_run, r"\.ckpt: towers\.clip\.text_projection is not finite"),
        (of_a_sharded_run, r"\.ckpt: towers\.clip\.text_projection is not finite"),
        (of_a_head, r"head \(.*head\.safetensors\): match\.weight is not finite"),
        (of_a_checkpoint_to_go_on_from, r"last\.ckpt\): towers.*text_projection.weight is not"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_weights_that_are_not_finite_are_refused_by_name_and_file(route, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        route(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_whose_bias_is_no_number_is_refused(tmp_path):
    write_folder(tmp_path, "clip")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "logit_bias": math.nan}))
    with pytest.raises(UserError, match=r"logit_bias \(nan\)"):
        build_dual_encoder(f"local-dir:{tmp_path}")


def test_state_of_an_encoder_whose_weights_are_numbers_is_read(tmp_path):
    encoder = DualEncoder(network_of(CLIP))
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").towers.keys() == {
        name.removeprefix("clip.") for name in encoder.state_dict()
    }
