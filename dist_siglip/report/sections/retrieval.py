"""Recall, hubs, a gallery of right and wrong answers, and the results of benchmarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from dist_siglip.metrics.evaluation import describe_num_pairs
from dist_siglip.report.canvas import (
    STYLES,
    Curve,
    add_legend,
    colour_of,
    draw_curves,
    new_figure,
    to_svg,
)
from dist_siglip.report.measures import DIRECTIONS, HUB_MEASURES, known, show, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    name_of,
    render_card,
    render_columns,
    render_figure,
    render_missing,
    render_table_card,
)
from dist_siglip.report.records import Overlay, Picture, RunRecord

_MOST_METRICS = 12
_MOST_CURVES = 3
_MOST_TOLD = 4
_MOST_PICTURES, _MOST_BESIDE = 24, 8  # of a single run, of each of several
_MOST_RANK = 100
_MANY_ORPHANS = 0.2


@dataclass(frozen=True)
class Answer:
    """One caption the model proposes for an image."""

    caption: str
    similarity: float
    is_right: bool


@dataclass(frozen=True)
class Exhibit:
    """An image, its caption, and what the model answers, best first."""

    picture: Picture
    caption: str
    answers: list[Answer]


def rank_captions(
    pictures: Sequence[Picture],
    captions: Sequence[str],
    image_features: np.ndarray,
    text_features: np.ndarray,
    *,
    ids: Sequence[np.ndarray] = (),
    top: int = 5,
) -> list[Exhibit]:
    """Find the ``top`` captions of each picture among all ``captions``.

    Captions with the same text are one answer, with the similarity of the best of them; an answer
    is right if its text is the image's own, or that of a pair with which the image shares an id. Of
    two equally similar captions the one that comes first in the gallery is shown first.

    Args:
        pictures: images to show; ``row`` points into the other arguments.
        captions: n captions.
        image_features: (n, D).
        text_features: (n, D), row-aligned with ``captions``.
        ids: (n,) each, of captions and of pictures, as far as they are known.
        top: most answers per picture.

    Example:
        >>> features = np.eye(2)
        >>> exhibits = rank_captions([Picture(1, "")], ["one", "two"], features, features)
        >>> [(answer.caption, answer.is_right) for answer in exhibits[0].answers]
        [('two', True), ('one', False)]
    """
    exhibits = []
    for picture in pictures:
        similarities = text_features.astype(np.float64) @ image_features[picture.row]
        answers: dict[str, Answer] = {}
        right = {captions[picture.row]}
        for kind in ids:
            right |= {captions[row] for row in np.flatnonzero(kind == kind[picture.row]).tolist()}
        for row in np.argsort(-similarities, kind="stable"):
            caption = captions[row]
            answer = Answer(caption, float(similarities[row]), caption in right)
            answers.setdefault(caption, answer)
            if len(answers) == top:
                break
        exhibits.append(Exhibit(picture, captions[picture.row], list(answers.values())))
    return exhibits


def render_gallery(heading: str, exhibits: Sequence[Exhibit], note: str) -> str:
    """Show images with their answers, right and wrong by word and sign as well as colour.

    Answers before the first right one are wrong; those behind it are other candidates.

    Args:
        heading: plain text.
        exhibits: images and answers.
        note: plain text below the heading; "" for none.
    """
    shown = "".join(_exhibit(exhibit) for exhibit in exhibits)
    told = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f'<h3>{escape(heading)}</h3>{told}<div class="gallery">{shown}</div>'


def _exhibit(exhibit: Exhibit) -> str:
    answers = exhibit.answers
    rights = [place for place, answer in enumerate(answers, 1) if answer.is_right]
    decided = rights[0] if rights else len(answers)
    listed = f"<ol>{''.join(map(_answer, answers[:decided]))}</ol>"
    if answers[decided:]:
        items = "".join(_answer(answer, mark_wrong=False) for answer in answers[decided:])
        listed += f'<p class="soft">other candidates</p><ol start="{decided + 1}">{items}</ol>'
    if exhibit.picture.written is not None:
        text = escape(exhibit.picture.written) or "nothing"
        listed += f'<p class="written"><span class="soft">the decoder writes</span> {text}</p>'
    if exhibit.picture.sought is not None:
        listed += (
            '<p class="written"><span class="soft">in green the place of</span> '
            f'{escape(exhibit.picture.sought)}<span class="soft">, in orange where the decoder '
            "finds it</span></p>"
        )
    return (
        f'<article class="card"><img src="{escape(exhibit.picture.data_uri)}" '
        f'alt="{escape(exhibit.caption)}"><h4>{escape(exhibit.caption)}</h4>{listed}</article>'
    )


def _answer(answer: Answer, *, mark_wrong: bool = True) -> str:
    kind, mark = "", ""
    if answer.is_right:
        kind, mark = ' class="right"', "<b>\N{CHECK MARK} right</b> "
    elif mark_wrong:
        kind, mark = ' class="wrong"', "<b>\N{MULTIPLICATION X} wrong</b> "
    return (
        f"<li{kind}>{mark}{escape(answer.caption)} "
        f'<span class="soft">{answer.similarity:.2f}</span></li>'
    )


def make_benchmarks(runs: Sequence[RunRecord]) -> Section | None:
    """List the results of RUN/benchmarks, and draw those of several steps; None without any."""
    results = {
        (each.dataset, each.task): None for run in runs for each in run.benchmarks if each.metrics
    }
    if not results:
        return None
    cards = []
    for index, (dataset, task) in enumerate(results):
        by_run = [
            next((e.metrics for e in run.benchmarks if (e.dataset, e.task) == (dataset, task)), {})
            for run in runs
        ]
        names = list({name: None for metrics in by_run for name in metrics})[:_MOST_METRICS]
        rows = [
            [name, *(show(metrics.get(name), "{:.4g}") for metrics in by_run)] for name in names
        ]
        heading = dataset if task in ("", dataset) else f"{dataset}, {task}"
        cards.append(render_table_card(heading, columns_of(runs), rows))
        drawing = draw_over_steps(runs, dataset, name=f"benchmark-{index}")
        if drawing is not None:
            caption = "Over the steps at which it was run."
            cards.append(render_figure(heading, drawing, caption, missing=""))
    verdicts = judge_each(runs, judge_benchmarks)
    overlays = [
        render_overlays(f"{each.dataset}: patches" + name_of(run, runs), each.examples)
        for run in runs
        for each in run.benchmarks
        if each.examples
    ]
    return Section("benchmarks", "Benchmarks", verdicts, [render_columns(cards), *overlays])


def render_overlays(heading: str, examples: Sequence[Overlay]) -> str:
    """Show pictures beside themselves with masks over them.

    Args:
        heading: plain text.
        examples: pictures, all with the same panels.
    """
    order = ", ".join(examples[0].panels)
    shown = "".join(_overlay(each) for each in examples)
    note = f"From left to right: {order}. Patches without a class are white."
    return (
        f'<div class="card overlays"><h3>{escape(heading)}</h3>'
        f'<p class="soft">{escape(note)}</p>{shown}</div>'
    )


def _overlay(example: Overlay) -> str:
    names = ", ".join(name for name, _ in example.classes)
    legend = " ".join(
        f'<span><b style="color:{escape(colour)}">\N{BLACK SQUARE}</b> {escape(name)}</span>'
        for name, colour in example.classes
    )
    return (
        f'<p><img src="{escape(example.data_uri)}" alt="{escape(names)}"></p>'
        f'<p class="soft">{legend}</p>'
    )


def judge_benchmarks(run: RunRecord) -> Verdict | None:
    """Tell the first number of each benchmark; None without any."""
    results = [each for each in run.benchmarks if each.metrics]
    if not results:
        return None
    first = [(each.dataset, *next(iter(each.metrics.items()))) for each in results[:_MOST_TOLD]]
    told = ", ".join(f"{dataset} {value:.3g} ({name})" for dataset, name, value in first)
    more = f", and {len(results) - len(first)} more" if len(results) > len(first) else ""
    return Verdict(
        "note",
        f"Benchmarks: {told}{more}.",
        "Classification and retrieval have the names and definitions of CLIP_benchmark, so they "
        "can be set beside its published tables.",
    )


def draw_over_steps(runs: Sequence[RunRecord], dataset: str, *, name: str) -> str | None:
    """Draw the first few metrics of a benchmark that were logged at several steps; None without."""
    curves = []
    for index, run in enumerate(runs):
        logged = {
            key.removeprefix(f"benchmarks/{dataset}/"): series
            for key, series in run.series.items()
            if key.startswith(f"benchmarks/{dataset}/") and len(series.steps) > 1
        }
        for place, (metric, series) in enumerate(list(logged.items())[:_MOST_CURVES]):
            label = metric if len(runs) == 1 else f"{run.short_name}, {metric}"
            colour = colour_of(place if len(runs) == 1 else index)
            curves.append(Curve(label, series, colour, STYLES[place], "s"))
    return draw_curves(name, "Results of a benchmark over steps", [("", curves)])


def make(runs: Sequence[RunRecord]) -> Section:
    """List and draw recall, and show pictures with right and wrong answers."""
    figures = [
        render_figure(
            "Recall by number of answers",
            draw_recall(runs),
            "Share of queries whose match is among the first so many answers, newest evaluation.",
            missing="No evaluation with ranks is in this run folder; validate the run first.",
        ),
        render_figure(
            "Recall@1 over the run",
            _draw_recall_over_steps(runs),
            "Share of queries whose first answer is right.",
            missing="No evaluation has logged it.",
        ),
    ]
    rows = _rows(runs)
    if rows:
        columns = ("recall", "@1", "@5", "@10", "median rank")
        note = "" if len(runs) > 1 else gallery_note(runs[0].metrics)
        figures.insert(0, render_table_card("In numbers", columns, rows, note=note))
    hubs = table_of(runs, HUB_MEASURES)
    if hubs:
        figures.append(render_card("Hubs and guarantees", hubs))
    parts = [render_columns(figures)]
    for run in runs:
        beside = (f": {run.name}", _MOST_BESIDE)
        parts += _gallery(run, *(beside if len(runs) > 1 else ("", _MOST_PICTURES)))
    verdicts = judge_each(runs, judge, judge_share, judge_directions, judge_hubs)
    return Section("retrieval", "Retrieval", verdicts, parts)


def judge(run: RunRecord) -> Verdict:
    """Set recall@1 against chance."""
    found = known(run.metrics, *(f"{key}_recall@1" for _, key in DIRECTIONS))
    pairs = run.metrics.get("gallery_pairs", math.nan)
    distinct = run.metrics.get("distinct_captions", math.nan)
    if found is None or not pairs > 0:
        return Verdict("unknown", "The run has no evaluation of retrieval.")
    chance = 1 / distinct if distinct > 0 else 1 / pairs
    recall = sum(found) / 2
    error = max(math.sqrt(each * (1 - each) / pairs) for each in found)
    told = (
        f"recall@1 is {found[0]:.3f} from image to text and {found[1]:.3f} from text to image "
        f"among {pairs:,.0f} pairs"
    )
    reason = (
        f"Chance is about {chance:.2g}; with so many queries recall is known to ±{2 * error:.2g}."
    )
    if recall < 5 * chance:
        return Verdict("bad", f"The model hardly retrieves better than chance: {told}.", reason)
    tone, word = ("good", "well") if recall >= 0.5 else ("note", "far above chance, not yet well")
    return Verdict("good" if tone == "good" else "note", f"It retrieves {word}: {told}.", reason)


def judge_share(run: RunRecord) -> Verdict | None:
    """Say so if the newest evaluation did not see all pairs there are."""
    found = known(run.metrics, "gallery_pairs", "available_pairs")
    if found is None or found[0] >= found[1]:
        return None
    return Verdict(
        "watch",
        f"The newest evaluation saw {describe_num_pairs(run.metrics)}.",
        "limit_val_batches or overfit_batches of the Trainer leaves the others out, or they cannot "
        "be read. Recall is higher in a smaller gallery.",
    )


def judge_directions(run: RunRecord) -> Verdict | None:
    """Say so if one direction is clearly better than the other."""
    found = known(run.metrics, *(f"{key}_recall@1" for _, key in DIRECTIONS), "gallery_pairs")
    if found is None or found[2] < 1:
        return None
    forward, backward, pairs = found
    error = math.sqrt((forward * (1 - forward) + backward * (1 - backward)) / pairs)
    if abs(forward - backward) <= max(0.02, 3 * error):
        return None
    better = "image to text" if forward > backward else "text to image"
    return Verdict(
        "watch",
        f"Retrieval is clearly better from {better}.",
        f"{forward:.3f} against {backward:.3f}, more than three standard errors. Often a few "
        "points of one side are near to everything (hubs), or captions repeat.",
    )


def judge_hubs(run: RunRecord) -> Verdict | None:
    """Say so if many items are in nobody's answers."""
    found = known(run.metrics, "image_to_text_orphans", "text_to_image_orphans")
    if found is None or max(found) <= _MANY_ORPHANS:
        return None
    kind = "texts" if found[0] >= found[1] else "images"
    return Verdict(
        "watch",
        f"{100 * max(found):.0f} % of the {kind} are in nobody's first ten answers.",
        "A few others, hubs, stand in their place. That is usual early in training and in narrow "
        "cones.",
    )


def gallery_note(metrics: dict[str, float]) -> str:
    """Say what the recall numbers are worth; made of numbers only."""
    note = (
        "An identical caption counts as a hit, and so does another of an identical picture; ties "
        "count against the query."
    )
    found = known(metrics, "gallery_pairs", "distinct_captions")
    if found is None or min(found) <= 0:
        return note
    pictures = metrics.get("distinct_pictures")
    also = "" if pictures is None else f" and {pictures:.0f} distinct pictures"
    return (
        f"Gallery of {describe_num_pairs(metrics)} with {found[1]:.0f} distinct captions{also}; "
        f"chance of recall@1 is about {1 / found[1]:.2g}. {note}"
    )


def draw_recall(runs: Sequence[RunRecord]) -> str | None:
    """Recall@k over k, logarithmic, both directions; None without ranks."""
    curves = []
    for index, run in enumerate(runs):
        for place, (label, key) in enumerate(DIRECTIONS):
            ranks = run.arrays.get(f"{key}_ranks")
            if ranks is not None and ranks.ndim == 1 and len(ranks):
                most = min(_MOST_RANK, int(run.metrics.get("gallery_pairs", _MOST_RANK)))
                answers = np.arange(1, max(2, most) + 1)
                shares = np.searchsorted(np.sort(ranks), answers, side="right") / len(ranks)
                name = label if len(runs) == 1 else f"{run.short_name}, {label}"
                curves.append((name, answers, shares, index, place))
    if not curves:
        return None
    figure, (axes,) = new_figure(1, 2.9)
    for name, answers, shares, index, place in curves:
        colour = colour_of(place if len(runs) == 1 else index)
        axes.plot(answers, shares, STYLES[place], color=colour, linewidth=1.6, label=f" {name}")
    axes.set_xscale("log")
    axes.set_xticks([1, 5, 10, 100], ["1", "5", "10", "100"])
    axes.set_xlim(1, max(len(answers) for _, answers, *_ in curves))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("answers looked at")
    axes.set_ylabel("recall")
    add_legend(axes)
    return to_svg(figure, "recall", "Recall over the number of answers looked at")


def _draw_recall_over_steps(runs: Sequence[RunRecord]) -> str | None:
    curves = [
        Curve(
            label if len(runs) == 1 else f"{run.short_name}, {label}",
            run.series[f"val/{key}_recall@1"],
            colour_of(place if len(runs) == 1 else index),
            STYLES[place],
            "s",
        )
        for index, run in enumerate(runs)
        for place, (label, key) in enumerate(DIRECTIONS)
        if f"val/{key}_recall@1" in run.series
    ]
    return draw_curves("recall-steps", "Recall at 1 over steps", [("recall@1", curves)])


def _rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    return [
        [
            label if len(runs) == 1 else f"{label}\n{run.name}",
            *(show(run.metrics.get(f"{key}_recall@{k}")) for k in (1, 5, 10)),
            show(run.metrics.get(f"{key}_median_rank"), "{:.0f}"),
        ]
        for label, key in DIRECTIONS
        for run in runs
        if f"{key}_recall@1" in run.metrics
    ]


def _gallery(run: RunRecord, whose: str, most: int) -> list[str]:
    if run.features is None or not run.pictures:
        text = f"There are no example images with features in this run folder{whose}."
        return [render_missing(text)]
    pictures = run.pictures[:most]
    known = [run.arrays.get(name) for name in ("caption_ids", "picture_ids")]
    ids = [each for each in known if each is not None and each.shape == (len(run.captions),)]
    exhibits = rank_captions(pictures, run.captions, *run.features, ids=ids)
    right = [each for each in exhibits if each.answers[0].is_right]
    wrong = sorted(
        (each for each in exhibits if not each.answers[0].is_right), key=_distance, reverse=True
    )
    distinct = len(set(run.captions))
    note = (
        f"{len(right)} of these {len(exhibits)} images have their own caption first, among "
        f"{distinct} distinct captions of {len(run.captions)} pairs. The heading is the true "
        "caption, the list the first five of the model with their cosines. The images lie evenly "
        "over the validation set."
    )
    return [
        render_gallery(f"{heading}{whose}", shown, text)
        for heading, shown, text in (
            ("Wrong first answers", wrong, note),
            ("Right first answers", right, "" if wrong else note),
        )
        if shown
    ]


def _distance(exhibit: Exhibit) -> float:
    """How much nearer the first answer is than the true caption, as far as that is shown."""
    own = [answer.similarity for answer in exhibit.answers if answer.is_right]
    return exhibit.answers[0].similarity - (own[0] if own else -1.0)
