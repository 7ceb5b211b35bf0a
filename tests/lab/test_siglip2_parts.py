"""Pictures of digits at known places, towers that learn from them, and the experiment on both."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dist_siglip.lab import LabSettings, digit_training
from dist_siglip.lab.digit_scenes import (
    BACKGROUND,
    build_digit_towers,
    draw_repeated,
    draw_scenes,
    tokenize,
)
from dist_siglip.lab.digit_training import POOL, SHARE_WRONG, Arm, DigitTraining, Trained
from dist_siglip.lab.digit_views import TEACHER_MOMENTUM, SelfTaught
from dist_siglip.lab.experiments import siglip2_parts
from dist_siglip.objectives import SelfDistillation


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(POOL, is_training=True, seed=0)


def test_ink_captions_boxes_and_patches_say_the_same(scenes):
    for place in range(200):
        labels = scenes.patch_labels[place].view(4, 4)
        assert (labels < BACKGROUND).sum() == 8
        for digit, box in zip(scenes.digits[place], scenes.boxes[place], strict=True):
            top, left, bottom, right = (4 * box).long()
            assert (labels[top:bottom, left:right] == digit).all()
            window = scenes.pictures[place, 0, 4 * top : 4 * bottom, 4 * left : 4 * right]
            assert window.max() > 1.5
        ground = scenes.pictures[place, 0][
            (labels == BACKGROUND).repeat_interleave(4, 0).repeat_interleave(4, 1)
        ]
        assert ground.max() < 0
    assert (scenes.digits[:, 0] <= scenes.digits[:, 1]).all()
    assert len(scenes.caption_ids.unique()) == 55


def test_pictures_depend_on_their_seed_and_are_of_other_handwriting_than_those_held_out(scenes):
    again, other, held_out = (
        draw_scenes(POOL, is_training=is_training, seed=seed)
        for is_training, seed in ((True, 0), (True, 1), (False, 0))
    )
    assert torch.equal(scenes.pictures, again.pictures)
    assert not torch.equal(scenes.pictures, other.pictures)

    def writing(found):
        """Grey levels of digits in the upper left corner, above those of the noise."""
        corner = found.pictures[(found.boxes[:, :, :2] == 0).all(dim=2).any(dim=1), 0, :8, :8]
        levels = (16 * (0.4 * corner + 0.2)).round().int()
        return {row.tobytes() for row in (levels * (levels > 2)).flatten(1).numpy()}

    assert len(writing(held_out)) > 300
    assert not writing(scenes) & writing(held_out)
    assert len(writing(scenes) & writing(other)) > 1000


def test_towers_are_of_timm_and_open_clip_and_the_same_at_one_seed(scenes):
    towers = build_digit_towers(32, seed=3).encoder
    features, tokens = towers.encode_image_tokens(scenes.pixels(slice(5)))
    assert tokens.shape == (5, 16, 32)
    assert torch.equal(features, towers.encode_image(scenes.pixels(slice(5))))
    assert towers.encode_text(tokenize(["3 7", "0 0"])).shape == features[:2].shape
    again = build_digit_towers(32, seed=3).encoder
    assert torch.equal(features, again.encode_image(scenes.pixels(slice(5))))


def test_a_region_is_a_digit_of_the_picture_and_none_where_both_are_equal(scenes):
    training = DigitTraining(Arm(), scenes, seed=0, steps=1)
    rows = torch.arange(300)
    found = training.rows_of(scenes, rows, torch.zeros(300, 16, 48), rows)
    equal = scenes.digits[:300, 0] == scenes.digits[:300, 1]
    assert torch.equal(found.regions.exist, ~equal)
    for place in rows[~equal].tolist():
        box = (4 * found.regions.boxes[place]).long()
        labels = scenes.patch_labels[place].view(4, 4)[box[0] : box[2], box[1] : box[3]]
        assert torch.equal(tokenize([str(int(labels[0, 0]))])[0, :1], found.regions.texts[place])


def test_four_in_ten_captions_are_wrong_where_some_are(scenes):
    captions = DigitTraining(Arm(wrong=SHARE_WRONG), scenes, seed=0, steps=1).captions
    wrong = float((captions != scenes.caption_ids).float().mean())
    assert wrong == pytest.approx(0.4 * (1 - 1 / 50), abs=0.02)


def test_every_quarter_shows_the_digit_in_handwriting_of_its_own():
    found = {}
    for is_training in (True, False):
        pictures, digits = draw_repeated(400, is_training=is_training, seed=0)
        assert len(digits.unique()) == 10
        quarters = pictures.unfold(2, 8, 8).unfold(3, 8, 8).reshape(400, 4, 64)
        assert all(len(each.unique(dim=0)) == 4 for each in quarters[:20])
        levels = (16 * (0.4 * quarters + 0.2)).round().int()
        found[is_training] = {
            (row.tobytes(), digit)
            for rows, digit in zip((levels * (levels > 2)).numpy(), digits.tolist(), strict=True)
            for row in rows
        }
    assert not found[True] & found[False]
    # What is drawn of one digit is drawn of no other.
    writings = [writing for writing, _ in found[True]]
    assert len(set(writings)) == len(writings) > 700


def taught(steps):
    built = build_digit_towers(32, seed=1)
    objective = SelfDistillation(
        start=0.5, local_views=3, local_size=8, prototypes=16, hidden=8, bottleneck=4
    )
    return SelfTaught(objective, built, seed=0, steps=steps, crop_size=8)


def test_the_teacher_begins_with_its_objective_and_then_follows_the_student(scenes):
    views = taught(steps=4)
    images, texts = scenes.pixels(slice(6)), torch.zeros(6, 1, dtype=torch.long)
    features, term = views.encode(images, texts, 1)
    views.follow()
    assert (float(term), views.gauges(), bool(views.teacher.has_begun)) == (0.0, {}, False)
    later, term = views.encode(images, texts, 2)
    assert torch.equal(features, later)
    term.backward()
    student = views.towers.clip.visual.trunk.patch_embed.proj.weight
    assert student.grad.abs().sum() > 0
    assert all(value.grad.abs().sum() > 0 for value in views.objective.parameters())
    before = student.detach().clone()
    with torch.no_grad():
        student += 1
    views.follow()
    moved = views.teacher.visual.trunk.patch_embed.proj.weight - before
    assert torch.allclose(moved, torch.full_like(moved, 1 - TEACHER_MOMENTUM), atol=1e-6)
    assert 0 < views.gauges()["entropy"] <= views.gauges()["mean_entropy"] <= 1.00001


class PoolHere(ThreadPoolExecutor):
    """Instead of processes one thread, that gets and gives copies as they would."""

    def __init__(self, processes, mp_context):
        super().__init__(1)

    def submit(self, run, job):
        return super().submit(lambda: copied(run)(copied(job)))


def copied(value):
    return pickle.loads(pickle.dumps(value))


def test_the_whole_run_has_every_arm_measure_and_claim(monkeypatch):
    """With eight steps, which prove nothing: each verdict follows from its number all the same."""
    for name in ("_HELD_OUT", "_DENSE", "_ROTATED"):
        monkeypatch.setattr(digit_training, name, 40)
    for name in ("_ALONE_POOL", "_VOTERS"):
        monkeypatch.setattr(digit_training, name, 100)
    for module in (digit_training, siglip2_parts):
        monkeypatch.setattr(module, "POOL", 400)
        monkeypatch.setattr(module, "ALONE_STEPS", 8)
    monkeypatch.setattr(siglip2_parts, "ProcessPoolExecutor", PoolHere)
    monkeypatch.setattr(siglip2_parts, "_FULL", (8, 1, siglip2_parts._GROUPS, 0.5))
    done = []
    outcome = siglip2_parts.run(LabSettings(processes=2, progress=done.append))
    assert done == sorted(done)
    assert done[-1] == 1.0
    shown = [row.quantity for row in outcome.rows if row.published is None]
    assert len(shown) == len(set(shown)) == 142
    for arm in siglip2_parts._ARMS:
        for measure in ("recall@1", "patch accuracy"):
            assert sum(name.startswith(f"{arm}, 8 steps: {measure} (") for name in shown) == 1
    claims = [row for row in outcome.rows if row.published is not None]
    of_teacher = [row for row in claims if row.quantity.startswith(siglip2_parts._ALONE)]
    assert len(of_teacher) == 4
    rest = [row for row in claims if row not in of_teacher]
    limits = [float(row.published.split(";")[0].removeprefix("above ")) for row in rest]
    assert limits == [0.5, 0, 0, 0, -0.02, -0.02, 0.1, 0.1, -0.05]
    for row, limit in zip(rest, limits, strict=True):
        assert (row.verdict == "reproduced") == (row.ours > limit)
    assert [len(axes.patches) > 0 for axes in outcome.figure.axes] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_the_quick_run_shows_that_boxes_are_learned_and_how_a_teacher_collapses():
    done = []
    outcome = siglip2_parts.run(LabSettings(quick=True, progress=done.append))
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert [row for row in outcome.rows if not row.is_sound] == []
    assert outcome.figure.axes
    assert any("captions and boxes" in note for note in outcome.notes)


HEALTHY, ONE_POINT, UNIFORM = (0.6, 0.9), (0.0, 0.0), (1.0, 1.0)


@pytest.mark.parametrize(
    ("gauges", "differ"),
    [
        ((HEALTHY, ONE_POINT, UNIFORM), []),
        ((UNIFORM, ONE_POINT, UNIFORM), [0, 1]),
        ((ONE_POINT, ONE_POINT, UNIFORM), [0, 1]),
        ((HEALTHY, HEALTHY, UNIFORM), [2]),
        ((HEALTHY, ONE_POINT, HEALTHY), [3]),
        ((HEALTHY, UNIFORM, ONE_POINT), [2, 3]),
    ],
)
def test_a_teacher_that_collapses_otherwise_or_not_at_all_differs(gauges, differ):
    names = ("teacher's entropy", "teacher's mean_entropy")
    rest = {"teacher's kl": 1.0, "teacher's centre_norm": 1.0}
    found = {
        arm: [Trained([], {}, dict(zip(names, values, strict=True)) | rest)] * 2
        for arm, values in zip(siglip2_parts._ALONES, gauges, strict=True)
    }
    rows = list(siglip2_parts._claims_of_teacher(found))
    assert [place for place, row in enumerate(rows) if not row.is_sound] == differ


def results(**late):
    """Two seeds of two arms, that differ in one number."""
    base = dict.fromkeys(("recall@1", "patch accuracy", "mIoU", "pointing"), 0.5)
    arms = {siglip2_parts.SIGMOID: (base, base), siglip2_parts.CAPTIONS: ()}
    first, second = ({**base, **{k: v[seed] for k, v in late.items()}} for seed in (0, 1))
    arms[siglip2_parts.CAPTIONS] = (first, second)
    return {
        name: [siglip2_parts.Trained([0.3, 0.4, 0.5], base, numbers) for numbers in seeds]
        for name, seeds in arms.items()
    }


@pytest.mark.parametrize(
    ("recall", "kind"),
    [
        ((0.6, 0.7), "help: captions: recall@1 +0.150"),
        ((0.3, 0.4), "hurt: captions: recall@1 -0.150"),
        ((0.51, 0.52), "make no clear difference: captions: recall@1 +0.015"),
        ((0.49, 0.7), "make no clear difference: captions: recall@1 +0.095"),
    ],
)
def test_the_conclusion_follows_from_the_numbers(recall, kind):
    notes = list(siglip2_parts.conclusion(results(**{"recall@1": recall})))
    assert any(note.startswith(f"At the end these {kind}") for note in notes)
    assert notes[-1].endswith("steps: sigmoid +0.200; with captions +0.200.")
