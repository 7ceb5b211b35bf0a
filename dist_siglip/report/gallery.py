"""Validation images with the captions the model puts first, right and wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

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
