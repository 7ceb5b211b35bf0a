"""Every Python example of docs/ runs, with the small files and tensors that it takes as given."""

import re
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_siglip.data import Preprocessing
from dist_siglip.evaluation import EvaluatedModel
from dist_siglip.models import FusionConfig, FusionHead, build_dual_encoder, token_shapes
from dist_siglip.models.reranker import write_head
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config

DOCS = Path(__file__).parents[2] / "docs"
# Page -> words of its example that stand for what a reader has, and what they are here.
GIVEN = {
    "evaluation.md": {
        '"ViT-B-32", "laion2b_s34b_b79k"': '"tiny.json"',
        "/data/coco/test": "shards",
    },
    "own_loop.md": {
        '"ViT-B-32", "laion2b_s34b_b79k"': '"tiny.json"',
        '"shards/train"': '"shards"',
        '"shards/val"': '"shards"',
    },
}


def examples():
    for page in sorted([*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for number, block in enumerate(blocks):
            yield pytest.param(page.name, dedent(block), id=f"{page.stem}-{number}")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder with a model, shards, rows and a head, and the names an example may use."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    architecture = ARCHITECTURES["clip"]
    built = build_dual_encoder(write_config(tmp_path / "tiny.json", architecture))
    built.encoder.eval()
    write_shards(tmp_path / "shards", (3,))
    for name in ("images", "texts"):
        np.save(tmp_path / f"{name}.npy", F.normalize(torch.randn(50, 16), dim=1).numpy())
    shapes = token_shapes(built)
    head = FusionHead(shapes["image"], shapes["text"], FusionConfig(width=16, heads=2))
    write_head(tmp_path / "runs/reranker/reranker.safetensors", head, built)
    pixels, token_ids = inputs_of(architecture)
    return {
        "Path": Path,
        "built": built,
        "pixels": pixels,
        "token_ids": token_ids,
        "wrong_texts": None,
    }


@pytest.mark.parametrize(("page", "code"), list(examples()))
def test_an_example_of_the_pages_runs(page, code, given, capsys):
    for shown, here in GIVEN.get(page, {}).items():
        code = code.replace(shown, here)
    if "wrong_texts" in code:
        code = code.replace("wrong_texts", "texts._replace(tokens=texts.tokens.flip(0))")
    exec(compile(code, page, "exec"), given)
    if "print(" in code:
        assert capsys.readouterr().out.strip()
    for name, expected in re.findall(r"print\((.*)\)  # (.*)", code):
        assert str(eval(name, given)) == expected
    if page == "own_loop.md":
        assert "Retrieval" in Path("runs/mine/report.html").read_text(encoding="utf-8")
    if "Synonyms" in given:
        synonyms = given["Synonyms"]([("a hen", "a chicken"), ("a fox", "a vixen")])
        built = given["built"]
        model = EvaluatedModel.of(
            built.encoder,
            Preprocessing.of(built),
            logit_scale=1.0,
            logit_bias=0.0,
            device=torch.device("cpu"),
        )
        assert -1 <= synonyms.evaluate(model).metrics["cosine"] <= 1
