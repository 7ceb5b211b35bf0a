import pytest
import torch
import yaml

from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig
from dist_siglip.models.tuning import LoraSettings, TowerConfig, is_adapter
from dist_siglip.training.callbacks import AtomicCheckpointIO
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.module.trained import load_trained
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config
from tests.support.tuning_ranks import weights_beside


def run_of(tmp_path, kind="siglip", **settings):
    """A run folder with one checkpoint of a model whose parameters are random."""
    path = write_config(tmp_path / "tiny.json", ARCHITECTURES[kind])
    pretrained = weights_beside(path) if settings else None
    logits = LogitConfig(bias_parameterization="relative")
    module = SigLipModule(path, pretrained, logits=logits, **settings)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
        module.logits.log_scale.fill_(2.0)
        module.logits.relative_bias.fill_(0.5)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    content = {"state_dict": module.state_dict(), "global_step": 3, "global_batch_size": 64}
    AtomicCheckpointIO().save_checkpoint(content, run / "checkpoints" / "step=00000003.ckpt")
    lora = {"rank": 2, "alpha": None, "dropout": 0.0, "targets": None}
    towers = {"lora": lora if settings else None}
    model = {"model": path, "pretrained": None, "image_tower": towers, "text_tower": {"lora": None}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    return run, module.eval()


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_run_gives_its_trained_towers_scale_and_absolute_bias(tmp_path, kind, lora):
    settings = {} if lora is None else {"image_tower": TowerConfig(lora=lora)}
    run, module = run_of(tmp_path, kind, **settings)
    built = load_trained(run_dir=str(run))
    inputs = inputs_of(ARCHITECTURES[kind])
    for found, expected in zip(built.encoder(*inputs), module.towers(*inputs), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    scale, bias = (value.item() for value in module.logits())
    assert built.start_scale == pytest.approx(scale)
    assert built.start_bias == pytest.approx(bias)
    assert (built.trained_global_batch, built.trained_steps) == (64, 3)
    assert not any(is_adapter(name) for name in built.encoder.state_dict())
    assert not any(layer.training for layer in built.encoder.modules())


def test_the_weights_a_run_started_from_are_not_needed(tmp_path):
    run, _ = run_of(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["pretrained"] = str(tmp_path / "gone.pt")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_trained(run_dir=str(run)).weights_loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name either run_dir"),
        ({"run_dir": "a", "model": "b"}, "name either run_dir"),
        ({"run_dir": "nowhere"}, r"run_dir \(nowhere\) holds no readable config.yaml"),
        ({"run_dir": "a", "pretrained": "b"}, r"pretrained \(b\) is of model"),
        ({"model": "ViT-B-32", "ckpt_path": "b"}, r"ckpt_path \(b\) is of a run"),
    ],
)
def test_a_wrong_choice_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        load_trained(**arguments)
    assert "\n" not in str(caught.value)


def test_a_run_without_checkpoints_says_so(tmp_path):
    run, _ = run_of(tmp_path)
    (run / "checkpoints" / "step=00000003.ckpt").unlink()
    with pytest.raises(UserError, match="has no checkpoint"):
        load_trained(run_dir=str(run))


def test_a_checkpoint_of_another_width_names_the_tensors(tmp_path):
    run, _ = run_of(tmp_path)
    write_config(
        tmp_path / "tiny.json",
        {
            **ARCHITECTURES["siglip"],
            "text_cfg": {**ARCHITECTURES["siglip"]["text_cfg"], "width": 32},
        },
    )
    with pytest.raises(UserError, match=r"do not fit the model.*of another shape"):
        load_trained(run_dir=str(run))
