"""An experiment that takes no time, and whose last row is off."""

import math

from matplotlib.figure import Figure

from dist_siglip.lab import LabSettings, Outcome, judge, judge_claim


def run(settings: LabSettings) -> Outcome:
    settings.progress(0.5)
    settings.progress(1.0)
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    return Outcome(
        (
            judge("seed | as told", 7.0, settings.seed, 0.0),
            judge("not measured", None, math.nan),
            judge_claim("far off", "above 9", 1.0, holds=False, correction="it is below"),
            judge("off", 1.0, 2.0, 0.5),
        ),
        figure,
        ("a note",),
    )
