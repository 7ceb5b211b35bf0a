"""Validation images with the captions the model puts first, right and wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from dist_siglip.report.records import Picture


@dataclass(frozen=True)
class Answer:
    """One caption the model proposes for an image.

    Attributes:
        caption: its text.
        similarity: cosine with the image.
        is_right: whether it is a caption of the image.
    """

    caption: str
    similarity: float
    is_right: bool


@dataclass(frozen=True)
class Exhibit:
    """An image, its caption, and what the model answers, best first.

    Attributes:
        picture: the image.
        caption: the true one.
        answers: at most five different captions.
    """

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
        for known in ids:
            right |= {captions[row] for row in np.flatnonzero(known == known[picture.row]).tolist()}
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
