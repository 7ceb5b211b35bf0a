"""Dense evaluations: against plain loops in float64, on 1, 2 and 3 ranks, and what is refused."""

import base64
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_siglip.data.handwriting import draw_masked_numbers
from dist_siglip.data.samples.patches import PatchBudget, pack_pictures, unpack
from dist_siglip.data.samples.regions import WHOLE
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError
from dist_siglip.evaluation import (
    Classification,
    EvaluatedModel,
    HandwritingPatches,
    PatchSegmentation,
)
from dist_siglip.evaluation.patches import masked_pictures
from dist_siglip.evaluation.patches import measures as module
from dist_siglip.evaluation.patches.dense import PatchSettings
from dist_siglip.metrics.dense import patch_labels
from dist_siglip.models import build_dual_encoder
from dist_siglip.training.callbacks.benchmarks import write_result
from tests.support.benchmark_models import text_map
from tests.support.masked_folders import (
    NAMES,
    PATCH,
    SIDE,
    encode_patches,
    mask_png,
    patch_model,
    scene,
    write_scenes,
)
from tests.support.naflex import write_models
from tests.support.processes import run_ranks
from tests.support.shards import encode, tokenize
from tests.support.tiny_models import ARCHITECTURES, write_config

HERE = PatchSettings(local_batch_size=3, workers_per_rank=0, k=4, ridge=0.1)
CLASSES, TOKENS = len(NAMES), (SIDE // PATCH) ** 2


def loop_label(block):
    """The most frequent of the labels of a patch; of equals the lowest, 255 last."""
    counts = {}
    for label in block:
        counts[label] = counts.get(label, 0) + 1
    best = min(counts, key=lambda label: (-counts[label], label))
    return -1 if best == 255 else best


def loop_scene(number):
    """Tokens, features and labels of the patches of a picture, row by row."""
    picture, labels = scene(number)
    found = encode_patches(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    own = []
    for top in range(0, SIDE, PATCH):
        for left in range(0, SIDE, PATCH):
            block = labels[top : top + PATCH, left : left + PATCH]
            own.append(loop_label(block.flatten().tolist()))
    return found.tokens[0].double().tolist(), found.features[0].double().tolist(), own


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def loop_iou(told, labels, background=None):
    """Mean IoU over the classes that occur or are told, and accuracy without background."""
    ious = []
    for c in range(CLASSES):
        both = sum(t == c == own for t, own in zip(told, labels, strict=True) if own >= 0)
        either = sum(c in (t, own) for t, own in zip(told, labels, strict=True) if own >= 0)
        if either:
            ious.append(both / either)
    right = [t == own for t, own in zip(told, labels, strict=True) if own not in (-1, background)]
    return sum(ious) / len(ious), sum(right) / len(right)


def loop_metrics(train, test, background):
    """All metrics, a patch at a time."""
    bank = [
        (t, own) for tokens, _, labels in map(loop_scene, train)
        for t, own in zip(tokens, labels, strict=True) if own >= 0
    ]  # fmt: skip
    rows = np.array([[*token, 1.0] for token, _ in bank])
    wanted = np.eye(CLASSES)[[own for _, own in bank]]
    # Ridge regression as least squares of a longer system, not by normal equations.
    width = rows.shape[1]
    longer = np.vstack([rows, math.sqrt(HERE.ridge) * np.eye(width)])
    linear_map = np.linalg.lstsq(longer, np.vstack([wanted, np.zeros((width, CLASSES))]))[0]
    texts = text_map(tokenize([f"a photo of a {name}." for name in NAMES])).double().tolist()
    objects = [c for c in range(CLASSES) if c != background]
    told = {"knn": [], "linear": [], "text": []}
    every, hits, precisions, found_text = [], {"linear": [], "text": []}, [], []
    for tokens, features, labels in map(loop_scene, test):
        scores = {"linear": [], "text": []}
        for token, feature in zip(tokens, features, strict=True):
            near = sorted(((cosine(token, t), own) for t, own in bank), reverse=True)[: HERE.k]
            votes = [sum(math.exp(s / 0.07) for s, own in near if own == c) for c in range(CLASSES)]
            told["knn"].append(votes.index(max(votes)))
            scores["linear"].append([float(v) for v in np.array([*token, 1.0]) @ linear_map])
            scores["text"].append([dot(feature, text) for text in texts])
            told["linear"].append(int(np.argmax(scores["linear"][-1])))
            told["text"].append(max(objects, key=lambda c, s=scores["text"][-1]: s[c]))
        for place, own in enumerate(labels):
            if own in objects:
                row = scores["text"][place]
                found_text.append(all(row[own] > row[c] for c in objects if c != own))
        for c in set(labels) & set(objects):
            for way, each in scores.items():
                best = max(range(TOKENS), key=lambda place, c=c, rows=each: rows[place][c])
                hits[way].append(labels[best] == c)
            order = sorted((-scores["text"][p][c], p) for p in range(TOKENS) if labels[p] >= 0)
            right = total = 0
            for seen, (_, place) in enumerate(order, 1):
                if labels[place] == c:
                    right += 1
                    total += right / seen
            precisions.append(total / right)
        every += labels
    of_objects = [own if own in objects else -1 for own in every]
    return {
        "knn_mean_iou": loop_iou(told["knn"], every)[0],
        "knn_accuracy": loop_iou(told["knn"], every, background)[1],
        "linear_mean_iou": loop_iou(told["linear"], every)[0],
        "linear_accuracy": loop_iou(told["linear"], every, background)[1],
        "linear_pointing": sum(hits["linear"]) / len(hits["linear"]),
        "text_pointing": sum(hits["text"]) / len(hits["text"]),
        "patch_to_text_recall@1": sum(found_text) / len(found_text),
        "text_to_patch_map": sum(precisions) / len(precisions),
        "text_mean_iou": loop_iou(told["text"], of_objects)[0],
    }


def alone_in_its_rank(folder):
    """Broken on purpose: each rank cuts the bank by the numbers of its own patches."""
    gather, module.gather_rows = module.gather_rows, lambda rows, group=None: rows
    try:
        return PatchSegmentation(folder, settings=small_bank()).evaluate(patch_model()).metrics
    except UserError:
        return None
    finally:
        module.gather_rows = gather


def small_bank():
    return PatchSettings(local_batch_size=2, workers_per_rank=0, k=4, bank_patches=20)


def complaint(action):
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def evaluate(rank, world_size, folder):
    calls = []
    model = patch_model(calls)
    data = str(folder / "data")
    results = [
        PatchSegmentation(data, settings=HERE).evaluate(model),
        PatchSegmentation(data, background="ground", settings=HERE).evaluate(model),
        PatchSegmentation(data, settings=small_bank()).evaluate(model),
        # One picture teaches and one is asked: other ranks have none.
        PatchSegmentation(str(folder / "single"), settings=HERE).evaluate(model),
    ]
    bad = complaint(
        lambda: PatchSegmentation(str(folder / "bad"), settings=HERE).evaluate(patch_model())
    )
    return [tuple(each) for each in results], calls, bad, alone_in_its_rank(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("dense")
    write_scenes(made / "data")
    write_scenes(made / "single", (1, 1))
    write_scenes(made / "bad")
    (made / "bad/masks/val/011.png").write_bytes(mask_png(np.zeros((SIDE, SIDE - 1))))
    return made


@pytest.fixture(scope="module")
def alone(folder):
    return evaluate(0, 1, folder)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, folder, alone):
    return run_ranks(evaluate, request.param, folder)


@pytest.mark.parametrize(("place", "background"), [(0, None), (1, 0)])
def test_metrics_are_those_of_plain_loops(alone, place, background):
    metrics, details = alone[0][place]
    expected = loop_metrics(range(7), range(7, 12), background)
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert all(0.05 < value < 0.99 for value in metrics.values()), metrics
    assert details["background"] == (None if background is None else "ground")
    patches = [own for number in range(7, 12) for own in loop_scene(number)[2]]
    assert [each["patches"] for each in details["classes"]] == [
        patches.count(c) for c in range(CLASSES)
    ]
    assert -1 in patches


def test_results_do_not_depend_on_the_number_of_ranks(alone, ranks):
    for results, *_ in ranks:
        for (metrics, details), (expected, expected_details) in zip(results, alone[0], strict=True):
            assert metrics == pytest.approx(expected, abs=1e-9)
            assert details == expected_details


def test_ranks_call_the_encoders_equally_often(ranks):
    names = [[name for name, _ in calls] for _, calls, *_ in ranks]
    assert all(each == names[0] for each in names)
    assert min(rows for _, calls, *_ in ranks for _, rows in calls) >= 1


def test_a_smaller_bank_is_another_bank_of_the_stated_size(alone):
    (whole, _), _, (small, details), _ = alone[0]
    assert details["bank_patches"] == 20 < details["train_patches"]
    assert small["knn_mean_iou"] != whole["knn_mean_iou"]


def test_a_bank_that_ranks_choose_alone_is_noticed(alone, ranks):
    assert alone[3] == alone[0][2][0]
    assert all(
        broken is None or broken != pytest.approx(alone[3], abs=1e-9) for *_, broken in ranks
    )


def test_all_ranks_refuse_a_mask_of_another_size(alone, ranks):
    complaints = {bad for _, _, bad, _ in ranks}
    assert complaints == {alone[2]}
    assert "011.png has 15 x 16 pixels and its picture 16 x 16" in alone[2]
    assert "\n" not in alone[2]


def test_examples_are_pictures_with_the_masks_over_them(alone):
    examples = alone[0][1][1]["examples"]
    assert len(examples) == 4
    assert examples[0]["panels"] == ["picture", "mask", "knn", "linear", "text"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(examples[0]["base64"]))))
    assert sheet.shape == (224, 5 * 228 - 4, 3)
    picture, mask = sheet[:, :224].astype(int), sheet[:, 228:452].astype(int)
    # Patches of the ground look as in the picture, others are tinted.
    for place, own in enumerate(loop_scene(7)[2]):
        row, column = divmod(place, SIDE // PATCH)
        box = slice(row * 56 + 8, row * 56 + 48), slice(column * 56 + 8, column * 56 + 48)
        change = np.abs(picture[box] - mask[box]).mean()
        assert (change < 12) == (own == 0), (place, own, change)
    assert {each["name"] for each in examples[0]["classes"]} <= set(NAMES) - {"ground"}


def test_the_bank_does_not_depend_on_how_patches_come():
    """Any order, any batches; and it never holds much more than it may."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (
        torch.randn(12, 8, 3, generator=generator),
        torch.arange(96).view(12, 8) % 5 - 1,
    )
    banks = []
    for order in (list(range(12)), list(reversed(range(12)))):
        for size in (1, 5):
            bank = module.PatchBank(10, seed=4)
            for start in range(0, 12, size):
                rows = order[start : start + size]
                bank.add(
                    module.Patches(
                        rows, torch.empty(0), tokens[rows], torch.empty(0), labels[rows], (2, 4)
                    )
                )
                assert bank._num_rows <= 2 * 10
            banks.append(bank.shared_out(None))
    for found, own in banks:
        assert torch.equal(found, banks[0][0])
        assert torch.equal(own, banks[0][1])
        assert (own >= 0).all()
        assert len(own) == 10
    other = module.PatchBank(10, seed=5)
    other.add(
        module.Patches(list(range(12)), torch.empty(0), tokens, torch.empty(0), labels, (2, 4))
    )
    assert not torch.equal(other.shared_out(None)[0], banks[0][0])


def test_digits_have_the_class_of_their_box():
    pictures, masks = draw_masked_numbers(3, is_training=True, seed=1)
    assert set(np.unique(masks)) <= {-1, *range(11)}
    for picture, mask in zip(pictures, masks, strict=True):
        grey = picture.astype(float).mean(axis=2)
        paper = grey[mask == 10]
        # Ink lies in boxes; outside there is noise of 4 / sqrt(3), and ink that was blurred.
        assert (paper < np.median(paper) - 20).mean() < 0.03
        assert (grey[mask != 10] < np.median(paper) - 20).mean() > 0.3
    again, _ = draw_masked_numbers(3, is_training=True, seed=1)
    assert np.array_equal(again, pictures)
    other, _ = draw_masked_numbers(3, is_training=False, seed=1)
    assert not np.array_equal(other, pictures)


def naflex_metrics(models, folder, *, num_patches=None, turned=False):
    """Metrics of a NaFlex tower, or of the fixed one of the same weights, and its examples."""
    built = build_dual_encoder(*models, num_patches=num_patches)
    model = EvaluatedModel.of(
        built.encoder.eval(),
        Preprocessing.of(built),
        logit_scale=1.0,
        logit_bias=0.0,
        device=torch.device("cpu"),
    )
    seen = masked_pictures.see_packed
    if turned:  # broken: rows for columns
        masked_pictures.see_packed = lambda mask, window, packed: seen(mask.T, window, packed)
    try:
        metrics, details = PatchSegmentation(str(folder), settings=HERE).evaluate(model)
    finally:
        masked_pictures.see_packed = seen
    return metrics, details["examples"]


@torch.inference_mode()
def test_pictures_of_any_shape_have_the_metrics_of_the_fixed_tower_whatever_is_padding(tmp_path):
    models = write_models(tmp_path)
    write_scenes(tmp_path / "square", (3, 3), side=64)
    fixed, shown = naflex_metrics(models, tmp_path / "square")
    found, drawn = naflex_metrics(models, tmp_path / "square", num_patches=75)  # 8 x 8, then none
    assert found == pytest.approx(fixed, abs=1e-5)
    assert [each["classes"] for each in drawn] == [each["classes"] for each in shown]
    turned, _ = naflex_metrics(models, tmp_path / "square", num_patches=75, turned=True)
    assert turned != pytest.approx(fixed, abs=1e-3)
    write_scenes(tmp_path / "wide", (3, 3), side=64)
    for path in (tmp_path / "wide").rglob("*.png"):
        image = Image.open(path)
        cut = np.asarray(image)[16:48]
        path.write_bytes(mask_png(cut) if "masks" in path.parts else encode(Image.fromarray(cut)))
    whole, padded = (naflex_metrics(models, tmp_path / "wide", num_patches=n) for n in (32, 40))
    assert padded[0] == pytest.approx(whole[0], abs=1e-5)
    assert padded[1] == whole[1]
    shape = Image.open(io.BytesIO(base64.b64decode(whole[1][0]["base64"]))).size
    assert shape == (5 * 228 - 4, 112)


def test_a_mask_is_cut_as_its_packed_picture():
    mask = np.arange(8 * 16, dtype=np.int16).reshape(8, 16) // 16 // 4 * 4 + np.arange(16) // 4
    packed = pack_pictures(torch.zeros(3, 8, 16, dtype=torch.uint8), 4, 10)
    seen = torch.from_numpy(masked_pictures.see_packed(mask, WHOLE, packed))[None]
    assert patch_labels(seen, (4, 4), 8).tolist() == [[*range(8), -1, -1]]
    inputs = replace(patch_model().inputs, patches=PatchBudget(4, 10))
    collate = masked_pictures._Collator(inputs)  # of a rank without a picture
    empty = collate([masked_pictures.MaskedSample(0)])
    assert unpack(empty.pixels)[1].tolist() == [[1, 1]]
    assert patch_labels(empty.masks, (4, 4), 8).shape == (0, 10)


def tiny_vit(folder, kind):
    vision = {**ARCHITECTURES[kind]["vision_cfg"], "image_size": 64}
    if kind == "clip":
        vision |= {"layers": 2, "width": 32, "head_width": 16}
    architecture = {**ARCHITECTURES[kind], "vision_cfg": vision}
    built = build_dual_encoder(write_config(folder / "tiny.json", architecture))
    return EvaluatedModel.of(
        built.encoder.eval(),
        Preprocessing.of(built),
        logit_scale=1.0,
        logit_bias=0.0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_handwriting_needs_no_data_and_the_map_beats_chance(tmp_path, kind):
    torch.manual_seed(0)
    settings = PatchSettings(workers_per_rank=0, bank_patches=500)
    benchmark = HandwritingPatches(train_pictures=150, test_pictures=40, settings=settings)
    benchmark.check()
    result = benchmark.evaluate(tiny_vit(tmp_path, kind))
    # Towers of random weights: their tokens tell ink from paper at least.
    assert result.metrics["linear_pointing"] > 0.25
    assert all(0 <= value < 1 for value in result.metrics.values())
    write_result(tmp_path, benchmark, result, model="m", pretrained="p", step=1)
    details = json.loads((tmp_path / "details/handwriting_patches.json").read_text())
    assert details["train_pictures"] == 150
    assert [each["name"] for each in details["classes"]][::10] == ["zero", "background"]


def test_a_tower_without_patches_is_refused_before_anything_is_read(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "r.json", ARCHITECTURES["resnet"]))
    with pytest.raises(UserError, match="gives no patch tokens"):
        HandwritingPatches().check_towers(built.encoder)
    Classification("unused.tar").check_towers(built.encoder)
    vit = build_dual_encoder(write_config(tmp_path / "v.json", ARCHITECTURES["siglip"]))
    HandwritingPatches().check_towers(vit.encoder)


def test_a_model_without_a_way_to_patches_is_refused():
    model = patch_model()._replace(encode_patches=None)
    with pytest.raises(UserError, match="gives no patch tokens, which benchmark"):
        HandwritingPatches(settings=HERE).evaluate(model)


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        (lambda s: HandwritingPatches(train_pictures=0), r"train_pictures \(0\) must be at least"),
        (lambda s: HandwritingPatches(image_size=8), r"image_size \(8\) must be 32 to 1024"),
        (lambda s: HandwritingPatches(settings=PatchSettings(k=0)), r"settings.k \(0\)"),
        (lambda s: HandwritingPatches(settings=PatchSettings(ridge=0)), r"settings.ridge \(0\)"),
        (lambda s: HandwritingPatches(settings=PatchSettings(seed=-1)), r"settings.seed \(-1\)"),
        (
            lambda s: HandwritingPatches(settings=PatchSettings(temperature=math.nan)),
            r"settings.temperature \(nan\) must be above 0",
        ),
        (lambda s: HandwritingPatches(templates=["no place"]), "must say where the name goes"),
        (lambda s: PatchSegmentation(s, background="sky"), r"background \('sky'\) of benchmark"),
        (lambda s: PatchSegmentation(s, max_image_pixels=0), r"max_image_pixels \(0\)"),
        (lambda s: PatchSegmentation(s, max_image_pixels=99), "picture of 16 x 16 pixels, at most"),
    ],
)
def test_settings_out_of_range_are_told_in_one_line(folder, benchmark, message):
    with pytest.raises(UserError, match=message) as caught:
        benchmark(str(folder / "data")).check()
    assert "\n" not in str(caught.value)


def test_pictures_without_any_class_are_told(tmp_path):
    write_scenes(tmp_path / "none")
    for path in (tmp_path / "none/masks/val").iterdir():
        path.write_bytes(mask_png(np.full((SIDE, SIDE), 255)))
    with pytest.raises(UserError, match="no patch of the test pictures of benchmark"):
        PatchSegmentation(str(tmp_path / "none"), settings=HERE).evaluate(patch_model())


def test_tokens_that_are_not_finite_are_told(folder):
    def broken(pixels):
        found = encode_patches(pixels)
        return found._replace(tokens=found.tokens / 0)

    model = patch_model()._replace(encode_patches=broken)
    with pytest.raises(UserError, match="hold a value that is not finite"):
        PatchSegmentation(str(folder / "data"), settings=HERE).evaluate(model)


def test_masks_follow_the_crop_of_their_pictures(tmp_path):
    """A wide picture of which the model sees the middle: what it does not see has no part."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(3):
            picture, labels = scene(number)
            wide, far = Image.new("RGB", (3 * SIDE, SIDE), "white"), np.full((SIDE, 3 * SIDE), 3)
            wide.paste(picture, (SIDE, 0))
            far[:, SIDE : 2 * SIDE] = np.where(labels == 3, 2, labels)
            (tmp_path / f"images/{split}/{number}.png").write_bytes(encode(wide))
            (tmp_path / f"masks/{split}/{number}.png").write_bytes(mask_png(far))
    model = patch_model()
    model = model._replace(inputs=replace(model.inputs, resize_mode="shortest"))
    result = PatchSegmentation(str(tmp_path), classes=NAMES, settings=HERE).evaluate(model)
    by_name = {each["name"]: each["patches"] for each in result.details["classes"]}
    expected = [own for number in range(3) for own in loop_scene(number)[2]]
    assert by_name["sofa"] == 0
    assert by_name["cat"] == expected.count(1)
