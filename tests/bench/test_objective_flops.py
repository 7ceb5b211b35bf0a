"""Operations of objectives: the numbers of a published size, and those PyTorch counts."""

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_siglip.bench.objective_flops import (
    Blocks,
    Decoder,
    Part,
    Towers,
    caption_parts,
    loss_parts,
    pair_loss,
    step_flops_of,
    step_parts,
)
from dist_siglip.errors import UserError
from dist_siglip.losses import TeacherFeatures
from dist_siglip.losses.distillation import distillation_loss
from dist_siglip.models import build_dual_encoder
from dist_siglip.objectives import (
    Captioning,
    MaskedPrediction,
    Regions,
    Rows,
    SelfDistillation,
)
from dist_siglip.training.module.ema_teacher import EmaTeacher
from tests.support.tiny_models import ARCHITECTURES, write_config

# ViT-B/16 at 256 pixels, texts of 64 tokens.
IMAGE, TEXT = Blocks(256, 768, 3072, 12), Blocks(64, 768, 3072, 12)


def giga(parts):
    return [round(part.forward / 1e9, 1) for part in parts]


def test_numbers_of_a_published_size():
    assert giga(Towers(IMAGE, TEXT, 256, 768, 768).parts) == [46.2, 11.0]
    half = TEXT._replace(layers=6)
    assert giga(Decoder(half, 256, 768, 256_000).parts) == [6.7, 3.6, 25.2]
    assert giga(Decoder(half, 256, 768, 32_000).parts) == [6.7, 3.6, 3.1]
    assert pair_loss(768, 1000).step == 3 * 2 * 768 * 1000


def test_views_of_a_published_size():
    towers = Towers(IMAGE, TEXT, 256, 768, 768)
    # The published 49.3 leaves out what patches embed to.
    assert round(8 * (towers.view_flops(36) - 2 * 36 * 768 * 768) / 1e9, 1) == 49.3
    assert round(towers.view_flops(256) / 1e9, 1) == 46.2


def siglip2_b16(folder):
    """ViT-B/16 of SigLIP 2 at 256 pixels on the meta device, without its tokenizer."""
    architecture = open_clip.get_model_config("ViT-B-16-SigLIP2-256")
    del architecture["text_cfg"]["hf_tokenizer_name"]
    with torch.device("meta"):
        return build_dual_encoder(write_config(folder / "b16.json", architecture))


def test_stage_2_of_the_published_size_beside_sums_on_paper(tmp_path):
    """Those leave out pooling, embedding of patches, and in ratios heads and logits made anew."""
    built = siglip2_b16(tmp_path)
    tasks = {"tasks": ["caption", "referring", "grounded"]}
    stage_1 = [{"class_path": "x.Captioning", "init_args": tasks}]
    both = [{"class_path": "x.SelfDistillation"}, {"class_path": "x.MaskedPrediction"}]

    def parts(*objectives):
        return step_parts(built, {"model": {"objectives": objectives}}, 32_768)

    alone, one, two, without = (parts(*each) for each in ([], stage_1, [*stage_1, *both], both))
    found = {part.name: part.forward / 1e9 for part in two}
    assert found["local views"] == pytest.approx(49.3, rel=0.03)
    assert found["teacher, global view"] == pytest.approx(46.2, rel=0.015)
    assert found["global view with hidden patches"] == pytest.approx(46.2, rel=0.015)
    hidden = [found[f"masked prediction, {name}"] for name in ("head", "logits")]
    assert sum(hidden) == pytest.approx(5.9, rel=0.01)  # 128 patches, 46 MFLOP each
    flops = [step_flops_of(each) for each in (alone, one, two, without)]
    assert flops[2] / flops[1] == pytest.approx(1.66, abs=0.02)  # on paper 1.71
    assert flops[3] / flops[0] == pytest.approx(3.14, abs=0.02)  # on paper 2.9


def test_bytes_of_the_teacher_of_the_published_size(tmp_path):
    built = siglip2_b16(tmp_path)
    objectives = {"a": SelfDistillation(), "b": MaskedPrediction()}
    with torch.device("meta"):
        for objective in objectives.values():
            objective.build(built, built.encoder.image_token_shape(built.image_size))
        teacher = EmaTeacher(built.encoder, objectives, 0.996)

    def size(module):
        return sum(each.numel() * each.element_size() for each in module.state_dict().values())

    assert {each.dtype for each in teacher.parameters()} == {torch.float32}
    assert not any(each.requires_grad for each in teacher.parameters())
    assert size(teacher.visual) / 1e9 == pytest.approx(0.372, abs=0.001)
    assert size(teacher.heads) / 1e9 == pytest.approx(0.185, abs=0.001)
    assert size(teacher) / 1e9 == pytest.approx(0.56, abs=0.005)


def test_objectives_of_a_teacher_count_its_pass_once_and_heads_by_vectors(built):
    sizes = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
    small = {"class_path": "x.SelfDistillation", "init_args": {"local_views": 3, **sizes}}
    hidden = {"class_path": "x.MaskedPrediction", "init_args": sizes}
    both = step_parts(built, {"model": {"objectives": [small, hidden]}}, 16)
    found = {part.name: part for part in both}
    assert len(found) == len(both)
    shape = built.encoder.image_token_shape(built.image_size)
    head, logits = 2 * (shape.width * 16 + 16 * 16 + 16 * 8), 2 * 8 * 32
    rows = {name: found[f"{name}, head"].forward / head for name in NAMES}
    assert rows == {NAMES[0]: 3, NAMES[1]: shape.num_tokens / 2}
    assert found[f"{NAMES[0]}, logits"] == (f"{NAMES[0]}, logits", 3 * logits, 4)
    assert found[f"{NAMES[0]}, logits of the teacher"].step == 2 * logits
    whole = Towers.of(built).view_flops(shape.num_tokens)
    assert found["teacher, global view"].step == whole
    assert found["global view with hidden patches"].step == 3 * whole
    alone = step_parts(built, {"model": {"objectives": [hidden]}}, 16)
    assert "local views" not in {part.name for part in alone}


NAMES = ("self distillation", "masked prediction")


def test_three_tasks_share_the_keys_of_patches():
    three = Decoder(Blocks(3 * 64, 768, 3072, 6), 256, 768, 256_000).parts
    # The published sum, and what rows of all tasks in one attention add to it.
    more = 6 * 4 * (192**2 - 3 * 64**2) * 768
    assert round((sum(part.forward for part in three) - more) / 1e9) == 99


def test_logits_are_made_twice():
    assert [part.times for part in Decoder(Blocks(2, 4, 8, 1), 3, 4, 10).parts] == [3, 3, 4]
    assert Part("", 5.0, 4).step == 20


@pytest.fixture(params=["clip", "siglip"])
def built(request, tmp_path):
    return build_dual_encoder(write_config(tmp_path / "m.json", ARCHITECTURES[request.param]))


def counted(run):
    """FLOPs of one of two pairs. PyTorch does not know the product that is added in place."""
    more = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run()
    return counter.get_total_flops() / 2


def test_towers_are_those_that_pytorch_counts(built):
    expected = [part.forward for part in Towers.of(built).parts]
    *image, text = expected
    size, length = built.image_size, built.context_length
    clip = built.encoder.to("meta").clip.eval()
    images = torch.zeros(2, 3, size, size, device="meta")
    texts = torch.zeros(2, length, dtype=torch.int64, device="meta")
    assert counted(lambda: clip.encode_image(images)) == sum(image)
    assert counted(lambda: clip.encode_text(texts)) == text


@pytest.mark.parametrize("tasks", [["caption"], ["caption", "referring", "grounded"]])
def test_the_decoder_is_what_pytorch_counts_forward_and_backward(built, tasks):
    shape = built.encoder.image_token_shape(built.image_size)
    settings = {"layers": 2, "tasks": tasks}
    body, patches, logits = caption_parts(built, settings)
    objective = Captioning(**settings)
    objective.build(built, shape)
    tokens = torch.zeros(2, *shape, requires_grad=True)
    texts = torch.zeros(2, built.context_length, dtype=torch.int64)
    regions = Regions(texts, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    none = torch.zeros(2, dtype=torch.int64)
    rows = Rows(tokens, texts, none, none == 0, regions)
    with sdpa_kernel(SDPBackend.MATH):
        found = {}
        forward = counted(lambda: found.update(objective(rows)))
        backward = counted(sum(term.total for term in found.values()).backward)
    assert forward == body.forward + patches.forward + logits.forward
    assert forward + backward == body.step + patches.step + logits.step


def test_parts_of_a_step_follow_its_settings(built):
    def parts(**model):
        return step_parts(built, {"model": model}, 16)

    width = built.embed_dim
    plain = step_parts(built, {}, 16)
    assert plain[-1] == pair_loss(width, 16)
    nested = {"class_path": "x.MatryoshkaLoss", "init_args": {"dims": [width, width // 2]}}
    assert parts(loss=nested)[-1].forward == 1.5 * plain[-1].forward
    decoder = {"class_path": "dist_siglip.objectives.Captioning"}
    assert parts(objectives=[decoder])[len(plain) :] == caption_parts(built, {})
    assert parts(objectives=[{"class_path": "mine.Objective"}]) is None
    assert parts(loss={"class_path": "mine.Loss"}) is None
    twice = step_parts(built, {"data": {"captions": {"weights": {"txt": 1, "long": 1}}}}, 16)
    *of_images, text, loss = plain
    assert twice[:-2] == of_images
    assert [each.forward for each in twice[-2:]] == [2 * text.forward, 2 * loss.forward]


def test_negative_texts_are_encoded_and_met_by_every_picture(built):
    *of_images, text, loss = step_parts(built, {}, 16)
    captions = {"weights": {"txt": 1, "long": 1}, "negatives": "wrong", "num_negatives": 3}
    found = step_parts(built, {"data": {"captions": captions}}, 16)
    assert found[:-2] == of_images
    assert [part.forward for part in found[-2:]] == [5 * text.forward, 2 * 4 * loss.forward]


def test_curation_brings_more_pairs_forward_through_learner_and_reference(built, tmp_path):
    model = write_config(tmp_path / "reference.json", ARCHITECTURES["clip"])
    reference = Towers.of(build_dual_encoder(model)).parts
    curation = {"filter_ratio": 0.75, "chunks": 8}

    def parts(teacher):
        model = {"curation": curation, "teachers": [teacher]}
        return step_parts(built, {"model": model}, 16)

    plain, stored = step_parts(built, {}, 16), parts({"features": "rows", "dim": 6})
    towers = plain[:-1]
    assert stored[: len(plain)] == plain
    assert [part.step for part in stored[len(plain) : -1]] == [4 * part.forward for part in towers]
    # Both sides of both models, of 4 brought pairs for each that trains, against 7 of 8 chunks.
    assert stored[-1].step == 4 * 2 * 2 * (built.embed_dim + 6) * 14
    live = parts({"model": model})
    more = live[len(stored) - 1 : -1]
    assert [part.step for part in more] == [4 * part.forward for part in reference]


def test_distillation_makes_the_logits_of_every_teacher_in_each_pass():
    def parts(**settings):
        loss = {"class_path": "x.DistillationLoss", "init_args": settings}
        return [part.step / (2 * 100) for part in loss_parts(loss, 8, 100, [8, 4])]

    assert parts() == [3 * 8, 12]  # student and base together, teachers
    ids = {"class_path": "x.SigLipLoss", "init_args": {"duplicates": "positive"}}
    assert parts(base=ids) == [3 * 8, 3 * 8, 12]  # base, student, teachers
    assert parts(form="softmax") == [3 * 8, 4 * 8, 2 * 12]
    assert parts(form="softmax", base={"class_path": "x.ClipLoss"}) == [4 * 8, 2 * 12]
    assert parts(share=1.0) == [3 * 8, 12]
    assert parts(share=1.0, form="softmax") == [4 * 8, 2 * 12]
    nested = {"class_path": "x.MatryoshkaLoss", "init_args": {"dims": [8, 2]}}
    assert parts(base=nested) == [3 * 10, 3 * 8, 12]
    assert pair_loss(8, 100, is_softmax=True).times == 4
    mined = {"class_path": "x.SigLipLoss", "init_args": {"mined_negatives": 4}}
    assert [part.step / (2 * 100) for part in loss_parts(mined, 8, 100, [])] == [3 * 8, 8]
    assert parts(base=mined) == [3 * 8, 8, 3 * 8, 12]


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_distillation_is_what_pytorch_counts(form):
    torch.manual_seed(0)
    rows, columns, dims = 6, 8, (8, 4)
    images, texts = torch.nn.functional.normalize(torch.randn(2, rows, columns), dim=-1)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    stored = torch.randn(2, rows, sum(dims))
    teachers = TeacherFeatures(*stored, dims=dims, scales=(9.0, 9.0), biases=(-5.0, -5.0))
    images.requires_grad_()
    texts.requires_grad_()
    found = counted(
        lambda: distillation_loss(
            images, texts, scale, bias, teachers=teachers, form=form, share=0.75
        )
    )
    base = {"class_path": "x.ClipLoss" if form == "softmax" else "x.SigLipLoss"}
    loss = {"class_path": "x.DistillationLoss", "init_args": {"base": base, "form": form}}
    assert 2 * found / rows == sum(part.step for part in loss_parts(loss, columns, rows, dims))


def test_a_live_teacher_is_its_towers_forward_and_a_stored_one_is_its_logits(built, tmp_path):
    model = write_config(tmp_path / "teacher.json", ARCHITECTURES["clip"])
    towers = Towers.of(build_dual_encoder(model)).parts
    loss = {"class_path": "x.DistillationLoss"}
    width = ARCHITECTURES["clip"]["embed_dim"]

    def parts(*teachers):
        return step_parts(built, {"model": {"loss": loss, "teachers": teachers}}, 16)

    live, stored = parts({"model": model}), parts({"features": "rows", "dim": width})
    assert [part.step for part in live[-2:]] == [part.forward for part in towers]
    assert live[:-2] == stored
    assert stored[-1] == Part("distillation, teachers", 2.0 * 16 * width, 1)
    assert parts({"features": "rows", "model": model}) == stored
    assert parts({"features": "rows"}) is None


def test_a_tower_without_blocks_is_refused(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "m.json", ARCHITECTURES["resnet"]))
    with pytest.raises(UserError, match="ModifiedResNet"):
        step_parts(built, {}, 16)
