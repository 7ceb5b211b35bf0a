"""Boxes written behind texts and texts behind boxes, against plain loops and broken variants."""

from types import SimpleNamespace

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import TokenShape
from dist_siglip.objectives import Captioning, Regions, Rows, uniform
from dist_siglip.objectives import captioning as captioning_module
from dist_siglip.objectives.captioning import box_bins_of, box_overlap, boxes_of
from tests.support import reference_captioning as reference

TASKS = ("caption", "referring", "grounded")
BINS = 10
WORDS = 40
PAD, END, START = 0, 39, 38


@pytest.fixture
def built(monkeypatch):
    """Stands in for a model with a text tower of few words."""
    sizes = {"width": 16, "heads": 2, "layers": 2, "vocab_size": WORDS, "mlp_width": 64}
    monkeypatch.setattr(captioning_module, "_text_sizes", lambda built: sizes)
    row = torch.tensor([[START, END, *[PAD] * 6]])
    return SimpleNamespace(tokenizer=lambda texts: row, context_length=8)


@pytest.fixture
def captioning(built):
    torch.manual_seed(1)
    objective = Captioning(parallel=0.5, layers=2, tasks=TASKS, box_bins=BINS)
    objective.build(built, TokenShape(4, 6))
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective.double()


def texts_of(count, seed):
    torch.manual_seed(seed)
    texts = torch.randint(1, 38, (count, 8))
    texts[:, 0] = START
    for row in range(count):
        end = 2 + (row + seed) % 6
        texts[row, end], texts[row, end + 1 :] = END, PAD
    return texts


BOXES = [[0.1, 0.2, 0.35, 0.99], [0, 0, 1, 1], [0, 0, 0, 0], [0.5, 0.55, 0.61, 0.72], [0, 0, 0, 0]]


def rows_of(**changes):
    """Five rows, of which three have a region."""
    torch.manual_seed(4)
    rows = Rows(
        tokens=torch.randn(5, 4, 6, dtype=torch.float64),
        texts=texts_of(5, 2),
        draws=torch.arange(5),
        valid=torch.ones(5, dtype=torch.bool),
        regions=Regions(texts_of(5, 3), torch.tensor(BOXES)),
    )
    return rows._replace(**changes)


def expected_losses(objective, rows):
    """Of each task by plain loops: summed over the rows that have it, and their number."""
    state = {name: value.detach() for name, value in objective.state_dict().items()}
    is_parallel = uniform(rows.draws, 0) < objective.parallel
    found = {}
    for number, task in enumerate(TASKS):
        start = 0 if task == "caption" else objective.decoder.mask_id + number
        total, count = 0.0, 0
        for row in range(len(rows.texts)):
            written = reference.task_row(
                task,
                rows.texts[row].tolist(),
                rows.regions.texts[row].tolist(),
                rows.regions.boxes[row].tolist(),
                num_words=WORDS,
                num_bins=BINS,
                end=END,
            )
            if written is None or not rows.valid[row]:
                continue
            ids, is_target = written
            parallel = is_parallel[row : row + 1] & (task == "caption")
            logits = reference.decode(
                state,
                torch.tensor([ids]),
                rows.tokens[row : row + 1],
                parallel,
                heads=2,
                mask_id=objective.decoder.mask_id,
                start_id=start,
            )
            total += reference.caption_loss(logits, [ids], [is_target])
            count += 1
        found[f"{task}_loss"] = (total, count)
    return found


def sums_of(terms):
    return {name: (term.total.item(), term.number.item()) for name, term in terms.items()}


def test_the_three_tasks_are_those_of_plain_loops(captioning):
    valid = torch.tensor([True, True, True, False, True])
    for rows in (rows_of(), rows_of(valid=valid)):
        found, expected = sums_of(captioning(rows)), expected_losses(captioning, rows)
        assert found.keys() == expected.keys()
        for name, (total, number) in expected.items():
            assert found[name] == (pytest.approx(total, rel=1e-10), number)
    assert [number for _, number in found.values()] == [4, 2, 2]


def test_rows_without_regions_count_nothing_and_keep_all_parameters_in_the_step(captioning):
    rows = rows_of(regions=Regions(texts_of(5, 3), torch.zeros(5, 4)))
    terms = captioning(rows)
    assert terms["referring_loss"] == (0, 0)
    assert terms["grounded_loss"] == (0, 0)
    whole = captioning(rows_of())
    assert terms["caption_loss"].total.item() == pytest.approx(whole["caption_loss"].total.item())
    sum(term.total for term in terms.values()).backward()
    assert all(
        each.grad is not None and each.grad.isfinite().all() for each in captioning.parameters()
    )


def test_a_row_sees_what_is_before_it_in_its_own_task_alone(captioning):
    rows = rows_of(draws=torch.tensor([3, 3, 3, 3, 3]))
    captioning.parallel = 1.0
    asked = captioning._asked(rows)
    lengths = [each.ids.shape[1] for each in asked.values()]
    assert lengths == [8, 12, 12]
    starts = [captioning._start_of(task) for task in TASKS]
    assert len({*starts, captioning.decoder.mask_id}) == 4

    def hidden(changed=None, place=0):
        ids = [each.ids.clone() for each in asked.values()]
        if changed is not None:
            ids[changed][:, place:] = 7
        mode = torch.ones(5, dtype=torch.bool)
        return captioning.decoder(ids, starts, rows.tokens, mode).split(lengths, dim=1)

    before = hidden()
    for changed in range(3):
        for place in range(lengths[changed]):
            after = hidden(changed, place)
            for number in range(3):
                if number != changed:
                    assert torch.equal(after[number], before[number])
            until = slice(0, place + 1)
            assert torch.equal(after[changed][:, until], before[changed][:, until])
            differs = not torch.equal(after[changed], before[changed])
            assert differs == (changed > 0 and place + 1 < lengths[changed])
    for number in (1, 2):  # alone as among the others
        (alone,) = [
            captioning.decoder([[*asked.values()][number].ids], [starts[number]], rows.tokens)
        ]
        assert torch.allclose(alone, before[number], atol=1e-12)


def test_text_and_box_are_targets_and_what_stands_before_the_text_is_not(captioning):
    asked = captioning._asked(rows_of())
    is_text = asked["caption"].is_target[1]
    assert is_text.tolist() == [False, True, True, True, True, True, False, False]
    referring, grounded = asked["referring"], asked["grounded"]
    assert referring.ids[0].tolist()[-4:] == [WORDS + part for part in (1, 2, 3, 9)]
    assert referring.is_target[:, -4:].all()
    assert grounded.is_target[:, :4].all()
    assert not referring.is_target[:, 0].any()
    assert not grounded.is_target[:, 4].any()  # the first token of the tokenizer
    assert referring.is_target.sum(dim=1).equal(grounded.is_target.sum(dim=1))
    assert grounded.ids.equal(referring.ids.roll(4, dims=1))


@pytest.mark.parametrize("broken", ["padding counts", "prefix counts", "box does not count"])
def test_the_comparison_rejects_other_targets(captioning, broken):
    rows = rows_of()
    expected = expected_losses(captioning, rows)
    whole = captioning._asked

    def other(rows):
        found = whole(rows)
        for task, each in found.items():
            is_target = each.is_target.clone()
            if broken == "padding counts":
                is_target |= each.ids == PAD
            elif broken == "prefix counts":
                is_target |= each.ids == START
            elif task != "caption":
                is_target &= each.ids < WORDS
            found[task] = each._replace(is_target=is_target)
        return found

    captioning._asked = other
    found = sums_of(captioning(rows))
    for name in ("referring_loss", "grounded_loss"):
        assert abs(found[name][0] - expected[name][0]) > 1e-3


def test_the_comparison_rejects_a_box_that_a_flip_left_behind(captioning):
    rows = rows_of()
    flipped = rows.regions.boxes.clone()
    flipped[:, 1], flipped[:, 3] = 1 - rows.regions.boxes[:, 3], 1 - rows.regions.boxes[:, 1]
    flipped[~rows.regions.exist] = 0
    other = rows._replace(regions=rows.regions._replace(boxes=flipped))
    expected, found = expected_losses(captioning, other), sums_of(captioning(rows))
    assert found["caption_loss"][0] == pytest.approx(expected["caption_loss"][0])
    for name in ("referring_loss", "grounded_loss"):
        assert abs(found[name][0] - expected[name][0]) > 1e-3


def test_bins_boxes_and_overlaps_are_those_of_plain_loops():
    torch.manual_seed(5)
    sides = torch.rand(50, 2, 2).sort(dim=1).values
    boxes = sides.flatten(1)[:, [0, 1, 2, 3]]
    others = torch.rand(50, 2, 2).sort(dim=1).values.flatten(1)
    found = box_overlap(boxes, others)
    expected = [
        reference.box_overlap(ours, theirs)
        for ours, theirs in zip(boxes.tolist(), others.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 in expected
    assert max(expected) > 0.3
    bins = box_bins_of(boxes, 500)
    assert (boxes_of(bins, 500) - boxes).abs().max() <= 0.501 / 500
    assert bins.tolist() == [[int(side * 500) for side in box] for box in boxes.tolist()]
    assert box_overlap(torch.tensor([[0.5, 0, 0.5, 1]]), torch.tensor([[0.0, 0, 1, 1]])).item() == 0


def test_boxes_are_written_side_by_side_and_measured(captioning):
    rows = rows_of()
    bins = captioning.write_boxes(rows.tokens, rows.regions.texts)
    state = {name: value.detach() for name, value in captioning.state_dict().items()}
    ids = torch.cat([rows.regions.texts, torch.full((5, 4), WORDS)], dim=1)
    for place in range(8, 12):
        logits = reference.decode(
            state,
            ids,
            rows.tokens,
            torch.zeros(5),
            heads=2,
            mask_id=captioning.decoder.mask_id,
            start_id=captioning._start_of("referring"),
        )
        ids[:, place] = WORDS + torch.tensor(logits[:, place, WORDS:].argmax(axis=1))
    assert bins.equal(ids[:, 8:] - WORDS)
    # Of four boxes it finds two and comes near another; the picture without one does not count.
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 4 + [[0.0] * 4])
    bins = box_bins_of(boxes, BINS)
    bins[2, 2], bins[3] = 6, 9
    captioning.write_boxes = lambda tokens, texts, *mask: bins
    found = captioning.measure(rows._replace(regions=rows.regions._replace(boxes=boxes)))
    assert found["box_exact"] == (2, 4)
    assert found["box_iou_50"] == (3, 4)
    assert found.keys() == {
        *(
            f"{task}_{kind}"
            for task in TASKS
            for kind in ("loss", "token_accuracy", "picture_gain")
        ),
        *("box_exact", "box_iou_50"),
    }


def test_it_learns_to_find_what_a_text_names(built):
    """Two things in each of four pictures; with another's patches it finds them where they are."""
    torch.manual_seed(6)
    objective = Captioning(parallel=0.0, layers=2, width=32, heads=4, tasks=TASKS, box_bins=4)
    objective.build(built, TokenShape(4, 8))
    corners = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5]])
    texts = torch.zeros(8, 8, dtype=torch.long)
    texts[:, 0], texts[:, 1], texts[:, 2] = START, 10 + torch.arange(8) % 2, END
    rows = Rows(
        torch.randn(4, 4, 8).repeat_interleave(2, dim=0),
        texts,
        torch.arange(8),
        torch.ones(8, dtype=torch.bool),
        Regions(texts, corners[[0, 1, 1, 2, 2, 0, 1, 0]]),
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.004)
    for _ in range(150):
        optimizer.zero_grad()
        sum(term.total / term.number for term in objective(rows).values()).backward()
        optimizer.step()
    found = objective.measure(rows)
    assert found["box_exact"] == (8, 8)
    assert found["referring_picture_gain"].total > 1
    assert found["grounded_token_accuracy"].total > 6  # which box comes first is open
    swapped = objective.write_boxes(rows.tokens.roll(2, dims=0), rows.regions.texts)
    assert swapped.equal(box_bins_of(rows.regions.boxes.roll(2, dims=0), 4))


def test_captions_alone_are_what_they_were(built):
    """Names and shapes of their heads, and their values for a seed, are those without tasks."""
    found = []
    for settings in ({}, {"tasks": ("caption",), "box_bins": 7}):
        torch.manual_seed(1)
        objective = Captioning(**settings)
        objective.build(built, TokenShape(4, 6))
        found.append(objective.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert found[0]["decoder.embedding.weight"].shape == (WORDS + 1, 16)
    assert objective.needs == {"image tokens", "captions"}
    assert Captioning(tasks=("caption", "grounded")).needs == objective.needs | {"regions"}


def test_captions_are_written_in_words_alone(captioning):
    torch.nn.init.constant_(captioning.output.bias[WORDS:], 100.0)
    written = captioning.write(torch.randn(2, 4, 6, dtype=torch.float64))
    assert written.shape == (2, 8)
    assert written.max() < WORDS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ("referring",)}, r"tasks \(\['referring'\]\) of Captioning must be caption and"),
        ({"tasks": ("caption", "caption")}, "each once"),
        ({"tasks": ("caption", "boxes")}, "must be caption and"),
        ({"box_bins": 1}, r"box_bins \(1\) of Captioning must be 2 to"),
        ({"box_bins": 10**6}, r"box_bins \(1000000\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        Captioning(**settings)
    assert "\n" not in str(caught.value)


def test_batches_without_regions_are_refused(captioning):
    with pytest.raises(UserError, match=r"need batches with regions; set data.regions.json_field"):
        captioning(rows_of(regions=None))
