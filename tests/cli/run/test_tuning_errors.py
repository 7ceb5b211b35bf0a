"""What can be wrong with a checkpoint, a tower, a strategy: one line, code 2, nothing written."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dist_siglip.cli import main
from tests.support.command import write_settings
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, network_of

CAPTIONING = '{{"class_path": "dist_siglip.objectives.Captioning"}}'
SHARDED = "dist_siglip.training.strategies.FullyShardedStrategy"
CASES = {
    "a checkpoint of another width": (
        ["--model.pretrained={wrong}/wide.safetensors"],
        "instead of (16, 8)",
    ),
    "a truncated file": (["--model.pretrained={wrong}/cut.safetensors"], "cannot be read"),
    "a truncated torch file": (["--model.pretrained={wrong}/cut.pt"], "cannot be read"),
    "a pickle with code": (
        ["--model.pretrained={wrong}/code.pt"],
        "hold more than tensors, or are damaged, and were not loaded",
    ),
    "a folder without tokenizer": (
        ["--model.model=local-dir:{wrong}/folder"],
        "holds no tokenizer (none of tokenizer.json",
    ),
    "adapters for a layer that is not there": (
        ['--model.image_tower.lora={{"targets": ["q_proj"]}}'],
        "image_tower.lora.targets (q_proj): the tower has no such layer; it has ",
    ),
    "adapters of rank 0": (['--model.text_tower.lora={{"rank": 0}}'], "text_tower.lora.rank (0)"),
    "shards on one rank": (
        [f"--trainer.strategy.class_path={SHARDED}"],
        "shards a model over ranks and there is one; raise trainer.devices",
    ),
    "shards on one rank, by a bare class path": (
        [f"--trainer.strategy={SHARDED}"],
        "shards a model over ranks and there is one; raise trainer.devices",
    ),
    "a class path of no strategy": (
        ["--trainer.strategy=dist_siglip.training.strategies.Sharded"],
        "trainer.strategy (dist_siglip.training.strategies.Sharded) is no class of a strategy; "
        "give ddp",
    ),
    "a random tower locked": (
        ["--model.image_tower.locked=true"],
        "image_tower.locked keeps the weights of a tower that were never loaded",
    ),
    "a captioning model, whatever else is missing": (
        ["--model.model=coca_ViT-B-32", "--model.pretrained=laion2b_s13b_b90k"],
        "model coca_ViT-B-32 is a captioning model (CoCa)",
    ),
    "an unknown way to shard": (
        [f"--trainer.strategy.class_path={SHARDED}", "--trainer.strategy.shard_within=rack"],
        "shard_within",
    ),
    "an unknown strategy": (
        ["--trainer.strategy=fsdp9"],
        "invalid strategy name: `strategy='fsdp9'",
    ),
    "features of no folder": (
        ["--data.train_features={wrong}/none", "--data.train_crop_scale=null"],
        "train_features ({wrong}/none) is no folder of embeddings",
    ),
    "a policy that timm does not know": (
        [
            "--data.stages=[{{class_path: dist_siglip.data.TimmAugment, "
            "init_args: {{policy: best}}}}]"
        ],
        "policy ('best') of TimmAugment is none that timm knows",
    ),
    "texts to spare by no regular expression": (
        ['--data.stages=[{{class_path: dist_siglip.data.RandomFlip, init_args: {{spares: "("}}}}]'],
        "spares ('(') of RandomFlip is no regular expression",
    ),
    "an unknown alarm": (["--collapse_alarm.action=shout"], "action"),
    "an alarm out of range": (["--collapse_alarm.rank_share=2"], "collapse_alarm.rank_share (2.0)"),
    "an objective on a locked image tower": (
        [
            "--model.pretrained={wrong}/whole.safetensors",
            "--model.image_tower.locked=true",
            f"--model.objectives=[{CAPTIONING}]",
        ],
        "objectives train the image tower, which is locked whole",
    ),
    "an objective beside features of what it reads": (
        [
            "--model.pretrained={wrong}/whole.safetensors",
            "--model.text_tower.locked=true",
            "--data.train_features={wrong}/features",
            f"--model.objectives=[{CAPTIONING}]",
        ],
        "objectives (Captioning) need captions, and train_features stand in for the text tower",
    ),
    "an objective twice": (
        [f"--model.objectives=[{CAPTIONING}, {CAPTIONING}]"],
        "objectives name Captioning twice",
    ),
    "too many unlocked groups": (
        ["--model.image_tower.locked=true", "--model.image_tower.unlocked_groups=9"],
        "image_tower.unlocked_groups (9) must be at most",
    ),
}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, settings):
    """Weights of another width, cut files, a pickle with code, a folder without tokenizer.

    And sound ones: weights, and features of captions by them.
    """
    folder = tmp_path_factory.mktemp("wrong")
    wide = {**ARCHITECTURES["clip"], "embed_dim": 12}
    save_file(network_of(wide).state_dict(), folder / "wide.safetensors")
    own = network_of(ARCHITECTURES["clip"]).state_dict()
    save_file(own, folder / "whole.safetensors")
    torch.save(own, folder / "whole.pt")
    content = yaml.safe_load(settings.read_text())
    words = [f"--model={content['model']['model']}", f"--pretrained={folder}/whole.safetensors"]
    words += [json.dumps(content["data"]["train_shards"]), "--format=features"]
    words += ["--towers=text", "--workers=0", "--dtype=float32"]
    assert main(["embed", *words, f"--out={folder}/features"]) == 0
    for kind in ("safetensors", "pt"):
        content = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    torch.save({"a": Evil(folder / "ran")}, folder / "code.pt")
    write_folder(folder / "folder", "siglip")
    for path in (folder / "folder").iterdir():
        if path.name.startswith(("tokenizer", "special")):
            path.unlink()
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_nothing_is_written(case, settings, wrong, tmp_path, capsys):
    options, text = CASES[case]
    words = [option.format(wrong=wrong) for option in options]
    run = tmp_path / "run"
    code = main(["fit", "--config", str(settings), "--run_dir", str(run), *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert text.format(wrong=wrong) in lines[-1]
    assert lines[-1].startswith("dist-siglip: error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (run / "config.yaml").exists()
    assert not (wrong / "ran").exists()
