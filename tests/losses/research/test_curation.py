"""Choice of pairs by what they have left to teach: scores, draws, and the same on any ranks.

The reference is plain loops in float64 over the whole matrix of scores. Negative controls: meetings
with chosen pairs of the own rank alone, and of one direction alone.
"""

import math
from functools import lru_cache

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import TeacherFeatures
from dist_siglip.losses.research import curation
from dist_siglip.losses.research.curation import LearnabilityScores, choose_learnable
from tests.support.parity import LAYOUTS, layouts_of, make_rows
from tests.support.processes import run_ranks

# Losses of learner and reference of four pairs, and what each promises once one is chosen.
LEARNER = [[0.9, 0.2, 0.1, 0.1], [0.3, 0.5, 0.1, 0.4], [0.1, 0.1, 0.7, 0.2], [0.2, 0.1, 0.1, 0.3]]
REFERENCE = [[0.2, 0.1, 0, 0.1], [0.1, 0.1, 0.1, 0.1], [0, 0.1, 0.6, 0.1], [0.1, 0, 0.1, 0.2]]
GIVEN = [
    [None, 0.7, 0.3, 0.2],
    [1.0, None, 0.1, 0.5],
    [0.9, 0.4, None, 0.2],
    [0.8, 0.8, 0.2, None],
]
LAYOUT_NAMES = [name for name, sizes in LAYOUTS.items() if len(sizes) < 4]
CHUNKS, SIZE = 3, 4
LOGITS = {"learner": ((5.0, -2.0),), "reference": ((12.0, -6.0), (20.0, -9.0))}
IDS = [4, 9, 4, 1, 9, 0, 2, 3, 8]
CASES = [(None, "negative"), ("ids", "negative"), ("ids", "positive"), ("ids", "masked")]


def model_with(losses):
    """Features whose pair losses are these: logits in the pictures, unit vectors for texts."""
    logits = torch.tensor(losses, dtype=torch.float64).clamp(min=1e-30).expm1().log()
    logits.diagonal().neg_()
    eye = torch.eye(len(logits), dtype=torch.float64)
    return TeacherFeatures(logits, eye, (len(logits),), (1.0,), (0.0,))


def test_scores_are_those_of_the_case():
    scores = LearnabilityScores(model_with(LEARNER), model_with(REFERENCE))
    assert scores.own.tolist() == pytest.approx([0.7, 0.4, 0.1, 0.1])
    for chosen, expected in enumerate(GIVEN):
        given = scores.own + scores.with_others(scores.columns(torch.tensor([chosen])))
        for pair, value in enumerate(expected):
            if value is not None:
                assert given[pair].item() == pytest.approx(value), (chosen, pair)


@lru_cache
def models_of(num_rows):
    """A learner, and two references side by side, of float64 features."""
    rows = make_rows(("I0", "T0", "I1", "T1", "I2", "T2"), num_rows)
    sides = [torch.cat([rows[f"{side}1"], rows[f"{side}2"]], dim=1) for side in "IT"]
    learner = TeacherFeatures(rows["I0"], rows["T0"], (5,), (5.0,), (-2.0,))
    return learner, TeacherFeatures(*sides, (5, 5), (12.0, 20.0), (-6.0, -9.0))


def part_of(model, rows):
    return model._replace(image=model.image[rows], text=model.text[rows])


@lru_cache
def noise_of(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    return torch.rand(num_rows, CHUNKS, generator=generator)


def score_matrix(num_rows, ids, duplicates):
    """All s[i][j] from the definition."""
    found = [[0.0] * num_rows for _ in range(num_rows)]
    for sign, model in zip((1, -1), models_of(num_rows), strict=True):
        start = 0
        for dim, scale, bias in zip(model.dims, model.scales, model.biases, strict=True):
            for i in range(num_rows):
                for j in range(num_rows):
                    dot = sum(
                        float(model.image[i, d]) * float(model.text[j, d])
                        for d in range(start, start + dim)
                    )
                    is_duplicate = ids is not None and i != j and ids[i] == ids[j]
                    y = 1 if i == j or (is_duplicate and duplicates == "positive") else -1
                    loss = math.log1p(math.exp(-y * (scale * dot + bias))) / len(model.dims)
                    if not (is_duplicate and duplicates == "masked"):
                        found[i][j] += sign * loss
            start += dim
    return found


def expected_choice(num_rows, ids, duplicates):
    s, noise = score_matrix(num_rows, ids, duplicates), noise_of(num_rows).double()
    chosen = []
    for chunk in range(CHUNKS):
        size = SIZE * (chunk + 1) // CHUNKS - SIZE * chunk // CHUNKS
        keys = {}
        for i in range(num_rows):
            if i not in chosen:
                keys[i] = -math.log(-math.log(noise[i, chunk]))
                if chunk:
                    keys[i] += s[i][i] + sum(s[i][j] + s[j][i] for j in chosen)
        chosen += sorted(keys, key=keys.get, reverse=True)[:size]
    return sorted(chosen), [s[i][i] for i in range(num_rows)]


def choose(rank, layout, ids, duplicates):
    start = sum(layout[:rank])
    rows, total = slice(start, start + layout[rank]), sum(layout)
    given = None if ids is None else torch.tensor(IDS[:total])[rows]
    models = (part_of(model, rows) for model in models_of(total))
    scores = LearnabilityScores(*models, given, duplicates)
    return choose_learnable(scores, noise_of(total)[rows], SIZE)


def all_cases(rank, world_size):
    return {
        (layout, case): choose(rank, LAYOUTS[layout], *case)
        for layout in layouts_of(world_size)
        for case in CASES
    }


@lru_cache
def results_of(world_size):
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_choice_of_any_ranks_is_that_of_plain_loops(layout, case):
    sizes = LAYOUTS[layout]
    found = [each[layout, case] for each in results_of(len(sizes))]
    ids = None if case[0] is None else IDS
    positions, own = expected_choice(sum(sizes), ids, case[1])
    for each in found:
        assert each.positions.tolist() == positions
    assert torch.cat([each.learnability for each in found]).tolist() == pytest.approx(own)
    chosen = torch.cat([each.is_chosen for each in found]).nonzero().flatten()
    assert chosen.tolist() == positions


def num_wrong(monkeypatch):
    """Of many draws of one process, how many are not those of the loops."""
    total, wrong = 7, 0
    for seed in range(30):
        noise = torch.rand(total, CHUNKS, generator=torch.Generator().manual_seed(seed))
        monkeypatch.setitem(globals(), "noise_of", lambda num_rows, noise=noise: noise)
        found = choose(0, (total,), None, "negative").positions.tolist()
        wrong += found != expected_choice(total, None, "negative")[0]
    return wrong


def test_the_comparison_rejects_other_scores(monkeypatch):
    assert num_wrong(monkeypatch) == 0
    whole = LearnabilityScores.with_others

    def one_way(self, others):
        """Without the texts of chosen pairs at the own pictures."""
        kept = [model._replace(text=torch.zeros_like(model.text)) for model in self._models]
        self._models, before = kept, self._models
        added = whole(self, others)
        self._models = before
        return added

    def alone(self, others):
        """What a rank would do that knows no chosen pair."""
        return torch.zeros_like(self.own)

    for broken in (one_way, alone):
        monkeypatch.setattr(LearnabilityScores, "with_others", broken)
        assert num_wrong(monkeypatch) > 0, broken.__doc__


def test_draws_follow_the_softmax_of_what_is_promised():
    """Two pairs of four, one after the other: every ordered draw has its probability."""
    scores = LearnabilityScores(model_with(LEARNER), model_with(REFERENCE))
    generator, count = torch.Generator().manual_seed(0), 2000
    found = torch.zeros(4, 4)
    for _ in range(count):
        noise = torch.rand(4, 2, generator=generator)
        first = int(noise[:, 0].argmax())
        both = choose_learnable(scores, noise, 2).positions.tolist()
        assert first in both
        both.remove(first)
        found[first, both[0]] += 1 / count
    for first, promised in enumerate(GIVEN):
        powers = [0.0 if each is None else math.exp(each) for each in promised]
        for second, power in enumerate(powers):
            expected = 0.25 * power / sum(powers)
            assert found[first, second].item() == pytest.approx(expected, abs=0.025)


def test_a_pair_whose_score_is_not_finite_comes_last():
    learner, reference = models_of(7)
    image = learner.image.clone()
    image[2, 0] = image[5, 1] = torch.nan
    scores = LearnabilityScores(learner._replace(image=image), reference)
    for seed in range(20):
        noise = torch.rand(7, 2, generator=torch.Generator().manual_seed(seed))
        assert not {2, 5} & set(choose_learnable(scores, noise, 5).positions.tolist())
        assert choose_learnable(scores, noise, 7).positions.tolist() == list(range(7))


def test_tiles_change_nothing_but_rounding(monkeypatch):
    scores = LearnabilityScores(*models_of(9))
    others = scores.columns(torch.tensor([0, 4, 8]))
    whole = scores.with_others(others)
    monkeypatch.setattr(curation, "tile_shape_of", lambda chunk_rows, device: (2, 2))
    assert torch.allclose(scores.with_others(others), whole, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 10])
def test_a_size_that_cannot_be_is_refused(size):
    scores = LearnabilityScores(*models_of(9))
    with pytest.raises(
        UserError, match=rf"pairs to choose \({size}\) must be from .* \(2\) to"
    ) as e:
        choose_learnable(scores, torch.rand(9, 2), size)
    assert "\n" not in str(e.value)
