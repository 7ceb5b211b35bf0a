"""One self-contained page about a run, from the files of its folder."""

from dist_siglip.report.build import write_report

__all__ = ["write_report"]
