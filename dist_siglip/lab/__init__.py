"""Published experiments, repeated with this library's own losses and metrics."""

from dist_siglip.lab.experiment import LabSettings, Outcome, Row, judge, judge_claim

__all__ = ["LabSettings", "Outcome", "Row", "judge", "judge_claim"]
