"""Parts of the SigLIP 2 recipe on pictures of digits whose places are known.

Towers that see the same pictures learn with the sigmoid loss alone, with captions beside it, with
captions and boxes (LocCa), at prefixes of the dimension, from a teacher, on clean captions and on
captions of which many are wrong, from pairs that are chosen from twice as many, and from what an
average of themselves says of hidden patches and small crops. Measured on handwriting that was not
trained on, a third of the way and at the end: recall@1, what patch tokens know of places, and boxes
that a text asks for.

Self-distillation by itself, on pictures whose crops all show the same digit: a teacher that tells
them apart, and one that collapses each way when a part of the loss is left out.

Source: Tschannen et al. 2025, arXiv:2502.14786. The paper has no ablation of its parts, so that
there are no numbers to reproduce; what must hold here is stated as a claim.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch

from dist_siglip.lab.digit_scenes import draw_scenes
from dist_siglip.lab.digit_training import (
    ALONE_PROTOTYPES,
    ALONE_STEPS,
    BATCH,
    CURVE_POINTS,
    CUTS,
    LEARNING_RATE,
    POOL,
    PROTOTYPES,
    SHARE_WRONG,
    VIEWS_START,
    Alone,
    Arm,
    DigitTraining,
    Teacher,
    Trained,
)
from dist_siglip.lab.experiment import (
    COLOURS,
    LINES,
    LabSettings,
    Outcome,
    Row,
    judge,
    judge_claim,
    label,
    new_figure,
)
from dist_siglip.report.sections.objectives import judge_gauges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DENSE_MEASURES = ("patch accuracy", "mIoU", "pointing")
_QUARTER = CURVE_POINTS // 4 + 1  # places of a curve that a quarter of the steps lies between
_NEAR = 0.02  # a difference of shares that counts as none


SIGMOID, CAPTIONS, _LOCCA = "sigmoid", "with captions", "with captions and boxes"
_NESTED, _NESTED_SMALL = "prefixes 32, 16", "prefixes 32, 16, 8, 4"
_PLAIN, _TAUGHT = "small", "small, distilled"
_NOISY, _NOISY_TAUGHT = "small, wrong captions", "small, wrong captions, distilled"
_CURATED_WRONG = 0.3
_UNCURATED = f"small, {_CURATED_WRONG:.0%} wrong captions"
_CURATED = f"{_UNCURATED}, curated"
_NESTINGS = (_NESTED, _NESTED_SMALL)
_MASKED, _CROPPED = "with hidden patches", "with small crops"
_VIEWS = (_MASKED, _CROPPED)
_ARMS = {
    SIGMOID: Arm(),
    CAPTIONS: Arm(tasks=("caption",)),
    _LOCCA: Arm(tasks=("caption", "referring", "grounded")),
    _NESTED: Arm(dims=(32, 16)),
    _NESTED_SMALL: Arm(dims=(32, 16, 8, 4)),
    _PLAIN: Arm(width=32),
    _TAUGHT: Arm(width=32, is_distilled=True),
    _NOISY: Arm(width=32, wrong=SHARE_WRONG),
    _NOISY_TAUGHT: Arm(width=32, wrong=SHARE_WRONG, is_distilled=True),
    _UNCURATED: Arm(width=32, wrong=_CURATED_WRONG),
    _CURATED: Arm(width=32, wrong=_CURATED_WRONG, is_curated=True),
    _MASKED: Arm(views="hidden patches"),
    _CROPPED: Arm(views="small crops"),
}
_ALONE = "small crops alone"
_NO_CENTRE, _NOT_SHARPER = f"{_ALONE}, no centre", f"{_ALONE}, teacher's temperature 0.2"
_ALONES = {
    _ALONE: Alone(),
    _NO_CENTRE: Alone(is_centred=False),
    _NOT_SHARPER: Alone(teacher_temperature=0.2),
}
# The gauge that tells each collapse, what it must be, and the words of a report.
_COLLAPSES = (
    (_NO_CENTRE, "mean_entropy", "below 0.05", "finds all pictures alike"),
    (_NOT_SHARPER, "entropy", "above 0.99", "finds all prototypes alike"),
)
# What one process trains one after the other; the first is the teacher of those that have one.
_GROUPS = (
    (SIGMOID, _PLAIN, _TAUGHT, _NOISY, _NOISY_TAUGHT, _UNCURATED, _CURATED),
    (_LOCCA,),
    (CAPTIONS,),
    (_NESTED,),
    (_NESTED_SMALL,),
    (_MASKED,),
    (_CROPPED,),
    tuple(_ALONES),
)
# Steps, seeds, what is trained, and the share of exact boxes that must be reached.
_FULL = 1200, 3, _GROUPS, 0.5
_QUICK = 160, 1, ((SIGMOID,), (_LOCCA,), tuple(_ALONES)), 0.2


class Job(NamedTuple):
    """A group of arms with one seed: pictures, towers and order of the batches are its own."""

    arms: tuple[str, ...]
    seed: int
    steps: int


Results = dict[str, list[Trained]]  # by arm, one for each seed


def run(settings: LabSettings) -> Outcome:
    """Train every arm at three seeds; when quick, some at one, two for an eighth of the steps."""
    steps, num_seeds, groups, least_exact = _QUICK if settings.quick else _FULL
    seeds = range(num_seeds)
    jobs = [Job(arms, settings.seed + seed, steps) for arms in groups for seed in seeds]
    found: dict[tuple[str, int], Trained] = {}
    num_arms = sum(len(job.arms) for job in jobs)
    for job, trained in run_jobs(jobs, settings.processes):
        found |= {(arm, job.seed): each for arm, each in trained.items()}
        settings.progress(len(found) / num_arms)
    results: Results = {
        arm: [found[arm, settings.seed + seed] for seed in seeds]
        for arm in (*_ARMS, *_ALONES)
        if (arm, settings.seed) in found
    }
    early = steps // 3
    rows = (*_claims(results, early, steps, least_exact), *_shown(results, early, steps))
    return Outcome(rows, _figure(results, steps), (*conclusion(results), *_notes(steps)))


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, dict[str, Trained]]]:
    """Train the arms of all jobs, in processes of one thread if several are allowed."""
    if processes == 1:
        for job in jobs:
            yield job, _train_arms(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(_train_arms, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _train_arms(job: Job) -> dict[str, Trained]:
    torch.set_num_threads(1)
    if job.arms[0] in _ALONES:
        return {name: _ALONES[name].run(job.seed) for name in job.arms}
    scenes = draw_scenes(POOL, is_training=True, seed=job.seed)
    teacher: Teacher | None = None
    found = {}
    for name in job.arms:
        training = DigitTraining(
            _ARMS[name], scenes, seed=job.seed, steps=job.steps, teacher=teacher
        )
        found[name] = training.run()
        if len(job.arms) > 1 and teacher is None:
            teacher = training.as_teacher()
    return found


class _Gain(NamedTuple):
    """A measure with a part, less that without it, of every seed."""

    part: str
    measure: str
    early: list[float]
    late: list[float]


# A part, and the arms and measures that show what it changes.
_COMPARED = (
    ("captions", CAPTIONS, SIGMOID),
    ("captions and boxes", _LOCCA, SIGMOID),
    ("boxes beside captions", _LOCCA, CAPTIONS),
    ("a teacher, clean captions", _TAUGHT, _PLAIN),
    ("a teacher, wrong captions", _NOISY_TAUGHT, _NOISY),
    ("curation, wrong captions", _CURATED, _UNCURATED),
    ("hidden patches", _MASKED, SIGMOID),
    ("small crops", _CROPPED, SIGMOID),
)
_CUT_COMPARED = (
    ("prefixes 32, 16 against a plain cut", _NESTED, "first 16", "first 16"),
    ("prefixes 32, 16 against PCA", _NESTED, "first 16", "PCA to 16"),
    ("prefixes 32, 16, 8, 4 against a plain cut", _NESTED_SMALL, "first 8", "first 8"),
    ("prefixes 32, 16, 8, 4 against PCA", _NESTED_SMALL, "first 8", "PCA to 8"),
)


def _gains(results: Results) -> Iterator[_Gain]:
    for part, arm, base in _COMPARED:
        if arm in results and base in results:
            for measure in ("recall@1", *_DENSE_MEASURES):
                yield _gain(results, part, (arm, measure), (base, measure))
    for part, arm, ours, theirs in _CUT_COMPARED:
        if arm in results:
            of_base = SIGMOID, f"recall@1, {theirs}"
            yield _gain(results, part, (arm, f"recall@1, {ours}"), of_base)
    for arm in _NESTINGS:
        if arm in results:
            yield _gain(results, f"{arm} at full width", (arm, "recall@1"), (SIGMOID, "recall@1"))


def _gain(results: Results, part: str, ours: tuple[str, str], theirs: tuple[str, str]) -> _Gain:
    early, late = (
        [
            a - b
            for a, b in zip(
                _values(results, *ours, late=late),
                _values(results, *theirs, late=late),
                strict=True,
            )
        ]
        for late in (False, True)
    )
    return _Gain(part, ours[1], early, late)


def _values(results: Results, arm: str, measure: str, *, late: bool) -> list[float]:
    """A measure of every seed."""
    return [(each.late if late else each.early)[measure] for each in results[arm]]


def _claims(results: Results, early: int, steps: int, least_exact: float) -> Iterator[Row]:
    exact = fmean(_values(results, _LOCCA, "box exact", late=True))
    yield judge_claim(
        f"{_LOCCA}, {steps:,} steps: box exact",
        f"above {least_exact}; by chance 0.11, of the right two 0.5",
        exact,
        exact > least_exact,
    )
    yield from _claims_of_teacher(results)
    if _NESTED not in results:
        return
    gains = {(gain.part, gain.measure): gain for gain in _gains(results)}
    boxes = "captions and boxes"
    for number, values in (
        (early, gains[boxes, "patch accuracy"].early),
        (steps, gains[boxes, "patch accuracy"].late),
    ):
        dense = fmean(values)
        yield judge_claim(
            f"{boxes}, {number:,} steps: patch accuracy gained", "above 0", dense, dense > 0
        )
    hidden = fmean(gains["hidden patches", "patch accuracy"].late)
    yield judge_claim(
        f"hidden patches, {steps:,} steps: patch accuracy gained", "above 0", hidden, hidden > 0
    )
    for part in (boxes, "hidden patches"):
        recall = fmean(gains[part, "recall@1"].late)
        yield judge_claim(
            f"{part}, {steps:,} steps: recall@1 gained", f"above -{_NEAR}", recall, recall > -_NEAR
        )
    taught = fmean(gains["a teacher, wrong captions", "recall@1"].late)
    yield judge_claim(
        f"a teacher, wrong captions, {steps:,} steps: recall@1 gained",
        "above 0.1",
        taught,
        taught > 0.1,
    )
    fewer = _CURATED_WRONG - fmean(_values(results, _CURATED, "wrong captions chosen", late=True))
    yield judge_claim(
        f"{_CURATED}, last third of {steps:,} steps: share of wrong captions loaded less that of "
        "the chosen half",
        "above 0.1",
        fewer,
        fewer > 0.1,
    )
    rotated = -fmean(gains["prefixes 32, 16 against PCA", "recall@1, first 16"].late)
    yield judge_claim(
        f"16 of 32 dimensions, {steps:,} steps: recall@1 of PCA less that of prefixes",
        "above -0.05",
        rotated,
        rotated > -0.05,
    )


def _claims_of_teacher(results: Results) -> Iterator[Row]:
    """Self-distillation by itself: what its gauges say, and what a report says of them."""
    gauges = "entropy", "mean_entropy", "kl", "centre_norm"
    told = {
        arm: [
            judge_gauges("self_distillation", *(each.late[f"teacher's {name}"] for name in gauges))
            for each in results[arm]
        ]
        for arm in _ALONES
    }
    choice, mean = (
        fmean(_values(results, _ALONE, f"teacher's {name}", late=True)) for name in gauges[:2]
    )
    tells = all(each.tone == "good" for each in told[_ALONE])
    yield judge_claim(
        f"{_ALONE}, {ALONE_STEPS} steps: entropy of the teacher's choice as a share of ln K",
        "below 0.9; of a guess 1, and a report says that it tells pictures apart",
        choice,
        choice < 0.9 and tells,
    )
    yield judge_claim(
        f"{_ALONE}, {ALONE_STEPS} steps: that of the mean of its choices less that of a choice",
        "above 0.1",
        mean - choice,
        mean - choice > 0.1,
    )
    for arm, gauge, claim, words in _COLLAPSES:
        value = fmean(_values(results, arm, f"teacher's {gauge}", late=True))
        yield judge_claim(
            f"{arm}, {ALONE_STEPS} steps: {gauge.replace('_', ' ')} of the teacher",
            f"{claim}, and a report says that it {words}",
            value,
            all(each.tone == "bad" and words in each.text for each in told[arm]),
        )


def _shown(results: Results, early: int, steps: int) -> Iterator[Row]:
    """Means over the seeds, with the number of each seed."""
    for late, number in ((False, early), (True, steps)):
        for arm, trained in results.items():
            at = number if arm in _ARMS else ALONE_STEPS * late
            for measure in trained[0].late if late else trained[0].early:
                if arm.startswith(_PLAIN) and measure in ("mIoU", "pointing"):
                    continue
                values = _values(results, arm, measure, late=late)
                seeds = ", ".join(f"{value:.3f}" for value in values)
                yield judge(f"{arm}, {at:,} steps: {measure} ({seeds})", None, fmean(values))


def conclusion(results: Results) -> Iterator[str]:
    """What helps, what hurts and what does neither, by the numbers; and how near the end is."""
    gains = list(_gains(results))
    for when, name in (("early", "A third of the way"), ("late", "At the end")):
        kinds: dict[str, list[str]] = {"help": [], "hurt": [], "make no clear difference": []}
        for gain in gains:
            values = getattr(gain, when)
            mean = fmean(values)
            kind = "make no clear difference"
            if abs(mean) >= _NEAR and len({value > 0 for value in values}) == 1:
                kind = "help" if mean > 0 else "hurt"
            kinds[kind].append(f"{gain.part}: {gain.measure} {mean:+.3f}")
        for kind, found in kinds.items():
            if found:
                yield f"{name} these {kind}: {'; '.join(found)}."
    rises = (
        f"{arm} {fmean(each.curve[-1] - each.curve[-_QUARTER] for each in trained):+.3f}"
        for arm, trained in results.items()
        if arm in _ARMS
    )
    yield f"Recall@1 gained in the last quarter of the steps: {'; '.join(rises)}."


def _notes(steps: int) -> tuple[str, ...]:
    return (
        "None of this was published: in that column stand claims of this experiment.",
        f"A difference counts if its mean is at least {_NEAR} and all seeds have its sign. Numbers "
        "in brackets are those of the seeds; recall@1 is the mean of both directions.",
        f"Pictures of 16 x 16 pixels, 16 patches, two digits of scikit-learn at nine places, "
        f"{POOL:,} for training; captions name the digits (55 different, equal ones are positive "
        f"pairs). Batch {BATCH}, {steps:,} steps of AdamW at {LEARNING_RATE} with a cosine; "
        "towers of timm and open_clip, 3 and 2 blocks of 48 channels (small: 32), 32 dimensions. "
        "Places of patches, and words and places of the decoder, start at a standard deviation of "
        "0.5.",
        f"Wrong captions: {SHARE_WRONG:.0%} are those of other pictures. The teacher is the "
        "sigmoid run, which saw the same pictures with clean captions: the favourable case. It is "
        f"also the reference of curation, which chooses {BATCH} of {2 * BATCH} pairs in each step.",
        f"Hidden patches (half of 16) and small crops (4 of 8 x 8 pixels) begin at "
        f"{VIEWS_START:.0%} of the steps with weight 1; {PROTOTYPES} prototypes, temperatures 0.04 "
        "and 0.1, momentum of the teacher 0.99; it sees the whole picture in another brightness. "
        "Its gauges are those of the last step: entropies as shares of ln K, kl in nats.",
        f"Small crops alone: one digit four times in a picture, crops of 12 x 12 pixels, "
        f"{ALONE_PROTOTYPES} prototypes, the teacher's temperature 0.02, no loss of pairs. Of two "
        "digits a small crop often shows none or one, so that what the whole picture says cannot "
        "be told from it. Digits told: by votes of the 10 nearest pooled vectors of training "
        "pictures; before the first step, too, as vectors of a random tower tell digits already.",
        "Patches: votes of the 10 nearest patches of training pictures, accuracy on digits, mIoU "
        "with background; pointing: the best patch of a linear map lies on the digit.",
    )


def _figure(results: Results, steps: int) -> "Figure":
    figure, (curves, dense, cuts, teacher, alone) = new_figure(5, panel_width=3.4, height=3.4)
    places = [steps * point / CURVE_POINTS for point in range(1, CURVE_POINTS + 1)]
    whole = [arm for arm in (SIGMOID, CAPTIONS, _LOCCA, *_NESTINGS) if arm in results]
    for number, arm in enumerate(whole):
        means = [fmean(at) for at in zip(*(each.curve for each in results[arm]), strict=True)]
        curves.plot(places, means, color=COLOURS[number], linestyle=LINES[number], label=arm)
    label(curves, "recall@1, mean of the seeds", "step", "")
    measures = (*_DENSE_MEASURES, "box exact")
    _bars(
        dense,
        measures,
        {
            arm: [(arm, each) for each in measures]
            for arm in (SIGMOID, CAPTIONS, _LOCCA, *_VIEWS)
            if arm in results
        },
        results,
    )
    label(dense, "places, at the end", "", "")
    sigmoid = {
        name: [(SIGMOID, f"recall@1, {way} {dim}") for dim in CUTS]
        for name, way in (("cut", "first"), ("PCA", "PCA to"))
    }
    nested = {arm: [(arm, f"recall@1, first {dim}") for dim in CUTS] for arm in _NESTINGS}
    _bars(cuts, [f"{dim} of 32" for dim in CUTS], sigmoid | nested, results)
    label(cuts, "recall@1 in fewer dimensions", "", "")
    taught = {
        name: [(arm, "recall@1") for arm in arms]
        for name, arms in (("small", (_PLAIN, _NOISY)), ("distilled", (_TAUGHT, _NOISY_TAUGHT)))
    }
    _bars(teacher, ("clean captions", "wrong captions"), taught, results)
    label(teacher, "recall@1 with a teacher", "", "")
    for number, arm in enumerate(_ALONES):
        at = [ALONE_STEPS * point / CURVE_POINTS for point in range(1, CURVE_POINTS + 1)]
        means = [fmean(each) for each in zip(*(each.curve for each in results[arm]), strict=True)]
        alone.plot(at, means, color=COLOURS[number], linestyle=LINES[number], label=arm)
    label(alone, "entropy of the teacher's choice / ln K", "step", "")
    for axes in (curves, dense, cuts, teacher, alone):
        axes.set_yticks([share / 5 for share in range(6)])
        axes.set_ylim(0, 1.02 if axes is curves else 1.4)  # a legend fits above the bars
    return figure


def _bars(
    axes: "Axes",
    groups: Sequence[str],
    kinds: dict[str, list[tuple[str, str]]],
    results: Results,
) -> None:
    """Draw means as bars and seeds as dots, side by side; what was not measured is left out.

    Args:
        axes: to draw on.
        groups: names on the x axis.
        kinds: by the name of a colour, arm and measure for each group.
        results: of all arms.
    """
    width = 0.8 / len(kinds)
    for number, (name, wanted) in enumerate(kinds.items()):
        for place, (arm, measure) in enumerate(wanted):
            if measure not in (results[arm][0].late if arm in results else ()):
                continue
            values = _values(results, arm, measure, late=True)
            x = place + (number - (len(kinds) - 1) / 2) * width
            axes.bar(
                x,
                fmean(values),
                0.9 * width,
                color=COLOURS[number],
                label=None if name in axes.get_legend_handles_labels()[1] else name,
            )
            axes.plot([x] * len(values), values, "k.", markersize=3)
    axes.set_xticks(range(len(groups)), groups, rotation=20, fontsize=8)
