"""What does a section conclude from its numbers, in plain words, and why?"""

from dataclasses import dataclass
from html import escape
from typing import Literal

Tone = Literal["good", "note", "watch", "bad", "unknown"]

# Told by sign and word as well as by colour.
_WORDS: dict[Tone, str] = {
    "good": "\N{CHECK MARK} Good",
    "note": "\N{BULLET} Note",
    "watch": "\N{WHITE DIAMOND} Look at this",
    "bad": "\N{MULTIPLICATION X} Problem",
    "unknown": "? Not known",
}


@dataclass(frozen=True)
class Verdict:
    """One conclusion.

    Attributes:
        tone: how good that is.
        text: the conclusion, a sentence.
        reason: what it rests on, or what to do about it, in a sentence or two.
    """

    tone: Tone
    text: str
    reason: str = ""


def render_verdict(verdict: Verdict, run: str = "") -> str:
    """Write a verdict as a paragraph.

    Args:
        verdict: the conclusion.
        run: name of the run it is about; empty where there is only one.

    Example:
        >>> render_verdict(Verdict("good", "1 < 2."))
        '<p class="verdict good"><b>✓ Good</b> 1 &lt; 2.</p>'
    """
    whose = f'<i class="run">{escape(run)}</i> ' if run else ""
    reason = f' <span class="soft">{escape(verdict.reason)}</span>' if verdict.reason else ""
    return (
        f'<p class="verdict {verdict.tone}"><b>{_WORDS[verdict.tone]}</b> {whose}'
        f"{escape(verdict.text)}{reason}</p>"
    )


def render_headline(verdict: Verdict) -> str:
    """Write a verdict without its reason, as a line of a list.

    Example:
        >>> render_headline(Verdict("bad", "No.", "It is so."))
        '<span class="verdict bad"><b>✕ Problem</b> No.</span>'
    """
    return (
        f'<span class="verdict {verdict.tone}"><b>{_WORDS[verdict.tone]}</b> '
        f"{escape(verdict.text)}</span>"
    )
