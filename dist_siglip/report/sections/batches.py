"""What the steps of a run were made of: pairs that were chosen, and shapes of pictures."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dist_siglip.report.canvas import Curve, Series, colour_of, draw_curves
from dist_siglip.report.measures import show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_figure,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_SHARE = "train/curation_share"
_CHOSEN, _ALL = "train/curation_learnability", "train/curation_learnability_all"
_LENGTH, _PADDING = "train/patches", "train/padding"
_FEWEST = 4  # logged steps that show how chosen pairs differ from others
_ERRORS = 2.0  # standard errors that a difference must be above
_MUCH_PADDING = 0.2
_EXPECTED = 5.0  # logged steps of a length, of which that none was drawn is no chance


def make_curation(runs: Sequence[RunRecord]) -> Section | None:
    """Draw the learnability of chosen pairs beside that of all; None if no run chose any."""
    if not any(_CHOSEN in run.series for run in runs):
        return None
    panels = [
        ("learnability", [*_curves(runs, _CHOSEN, "chosen"), *_curves(runs, _ALL, "read", "--")]),
    ]
    figure = render_figure(
        "Chosen pairs over the run",
        draw_curves("curation", "Learnability of chosen pairs and of all over steps", panels),
        "How much more the model loses on a pair than the reference does, in nats: the mean of the "
        "pairs that train, and of all that were read.",
        missing="Nothing was logged.",
    )
    rows = [
        ["share of the pairs that train", *(show(run.last(_SHARE)) for run in runs)],
        ["learnability of these\nlast quarter", *(show(_late(run, _CHOSEN)) for run in runs)],
        ["learnability of all pairs read", *(show(_late(run, _ALL)) for run in runs)],
    ]
    card = render_table_card("In numbers", columns_of(runs), rows)
    verdicts = judge_each(runs, judge_curation, judge_reference)
    return Section("curation", "Curation", verdicts, [render_columns([figure, card])])


def judge_curation(run: RunRecord) -> Verdict | None:
    """Say whether the chosen pairs are other ones than chance would take; None without any."""
    gaps = _gaps(run)
    if gaps is None:
        return None
    share = run.last(_SHARE)
    chosen = "The chosen pairs" if share is None else f"The chosen {100 * share:.0f} % of the pairs"
    if len(gaps) < _FEWEST:
        return Verdict("unknown", f"{chosen}: too few steps were logged to judge the choice.")
    late = gaps[-max(_FEWEST, len(gaps) // 4) :]
    gap, error = float(late.mean()), float(late.std(ddof=1) / np.sqrt(len(late)))
    told = (
        f"Their learnability is {gap:.3g} nats above that of all pairs read (standard error "
        f"{error:.1g}) in the last {len(late)} logged steps, and was {float(gaps[0]):.3g} in the "
        "first."
    )
    if gap <= _ERRORS * error:
        return Verdict(
            "watch",
            f"{chosen} are a draw by chance: they have no more to teach than the others.",
            f"{told} Scores then differ less than the noise that the choice is drawn with. Leave "
            "curation out, which costs a forward pass of all pairs, or take another reference.",
        )
    return Verdict("good", f"{chosen} teach {gap:.2g} nats more than the others.", told)


def judge_reference(run: RunRecord) -> Verdict | None:
    """Say so if the reference is no better on the pairs than the model; None if it is."""
    late = _late(run, _ALL)
    if late is None or late > 0:
        return None
    return Verdict(
        "watch",
        "The reference is no better than the model it chooses for.",
        f"On the pairs read the model loses {-late:.3g} nats less than the reference in the last "
        "quarter of the run, so what it finds easy is known already. Look at its scale and bias, "
        "take a better reference, or leave curation out from here on.",
    )


def make_patches(runs: Sequence[RunRecord]) -> Section | None:
    """Draw lengths and padding of pictures of any shape; None if no run has them."""
    if not any(_LENGTH in run.series for run in runs):
        return None
    panels = [
        ("patches of a picture", _curves(runs, _LENGTH, "", "", "o")),
        ("share of padding", _curves(runs, _PADDING, "", "", "o")),
    ]
    figure = render_figure(
        "Patches over the run",
        draw_curves("patches", "Length and share of padding over steps", panels),
        "Each step has one length, which its pictures fill as far as their shape allows.",
        missing="Nothing was logged.",
    )
    counts = {run.name: _counts(run) for run in runs}
    lengths = sorted({length for each in counts.values() for length in each})
    rows = [
        [f"{length:,} patches", *(_share_of(length, counts[run.name]) for run in runs)]
        for length in lengths
    ]
    card = render_table_card(
        "Lengths",
        columns_of(runs),
        rows,
        "Share of the logged steps.",
    )
    verdicts = judge_each(runs, judge_padding, judge_lengths)
    return Section("patches", "Shapes of pictures", verdicts, [render_columns([figure, card])])


def judge_padding(run: RunRecord) -> Verdict | None:
    """Say how much of the patches was padding; None where pictures have one shape."""
    series = run.series.get(_PADDING)
    if series is None:
        return None
    mean = float(series.values.mean())
    told = f"{100 * mean:.1f} % of the patches that the image tower computed were padding"
    if mean <= _MUCH_PADDING:
        return Verdict("good", f"{told}.")
    return Verdict(
        "watch",
        f"{told}.",
        "Pictures that are long, or small next to the length, do not fill it: take shorter "
        "lengths in data.sequence_lengths.",
    )


def judge_lengths(run: RunRecord) -> Verdict | None:
    """Name lengths of the configuration that were not drawn; None if all were, or may yet be."""
    listed, counts = run.settings.get("data.sequence_lengths"), _counts(run)
    weights = run.settings.get("data.length_weights")
    if not counts or not isinstance(listed, list) or not listed:
        return None
    if not isinstance(weights, list) or len(weights) != len(listed):
        weights = [1.0] * len(listed)
    total, steps = sum(weights), sum(counts.values())
    missing = [
        str(length)
        for length, weight in zip(listed, weights, strict=True)
        if not counts[length] and steps * weight >= _EXPECTED * total
    ]
    if not missing:
        return None
    return Verdict(
        "watch",
        f"Lengths that no logged step had: {', '.join(missing)}.",
        f"Of {steps} logged steps they should have {_EXPECTED:g} or more each; look at what the "
        "run went on from, and at data.length_weights.",
    )


def _curves(
    runs: Sequence[RunRecord], key: str, label: str, style: str = "-", marker: str = ""
) -> list[Curve]:
    """Curves of one quantity, each with the name of its run where there are several."""
    return [
        Curve(
            ", ".join(filter(None, ("" if len(runs) == 1 else run.short_name, label))),
            run.series[key],
            colour_of(index),
            style,
            marker,
        )
        for index, run in enumerate(runs)
        if key in run.series
    ]


def _gaps(run: RunRecord) -> np.ndarray | None:
    """Learnability of chosen pairs above that of all, step by step."""
    chosen, everyone = run.series.get(_CHOSEN), run.series.get(_ALL)
    if chosen is None or everyone is None:
        return None
    _, ours, theirs = np.intersect1d(chosen.steps, everyone.steps, return_indices=True)
    return chosen.values[ours] - everyone.values[theirs] if len(ours) else None


def _counts(run: RunRecord) -> Counter[int]:
    """Logged steps of each length."""
    series = run.series.get(_LENGTH)
    return Counter() if series is None else Counter(int(length) for length in series.values)


def _share_of(length: int, counts: Counter[int]) -> str:
    return f"{100 * counts[length] / counts.total():.0f} %" if counts else show(None)


def _late(run: RunRecord, key: str) -> float | None:
    series: Series | None = run.series.get(key)
    return None if series is None else float(series.tail(0.25).mean())
