"""The metrics as plain loops over pairs in float64, written from their definitions.

Imports nothing from the package; takes lists of lists or tensors, returns floats.
"""

import math


def _vectors(rows):
    return [[float(value) for value in row] for row in rows]


def _dot(first, second):
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


def _squared_distance(first, second):
    return math.fsum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def rank_of_best(query, gallery, query_id, gallery_ids, tolerance=1e-9):
    """1 + items that are not relevant and at least as similar as the best relevant one."""
    scores = [_dot(query, item) for item in gallery]
    relevant = [int(item_id) == int(query_id) for item_id in gallery_ids]
    if not any(relevant):
        return len(gallery) + 1
    best = max(score for score, good in zip(scores, relevant, strict=True) if good)
    ahead = [
        score
        for score, good in zip(scores, relevant, strict=True)
        if not good and score >= best - tolerance * (1 + abs(best))
    ]
    return 1 + len(ahead)


def ranks(queries, gallery, query_ids, gallery_ids):
    queries, gallery = _vectors(queries), _vectors(gallery)
    return [
        rank_of_best(query, gallery, query_id, gallery_ids)
        for query, query_id in zip(queries, query_ids, strict=True)
    ]


def pair_ranks(images, texts, picture_ids, caption_ids, sample_ids):
    """Ranks of every row in both directions, in galleries of different pictures and captions.

    Of a picture, or a caption, with several rows that of the lowest sample id stands there; a
    picture and a caption belong together if any row has both.
    """
    images, texts = _vectors(images), _vectors(texts)
    pictures, captions = ([int(value) for value in ids] for ids in (picture_ids, caption_ids))
    rows = sorted(range(len(images)), key=lambda row: int(sample_ids[row]))
    of_pictures, of_captions = {}, {}
    for row in rows:
        of_pictures.setdefault(pictures[row], images[row])
        of_captions.setdefault(captions[row], texts[row])
    together = set(zip(pictures, captions, strict=True))

    def rank(query, gallery, is_relevant):
        names = list(gallery)
        ids = [int(is_relevant(name)) for name in names]
        return rank_of_best(query, [gallery[name] for name in names], 1, ids)

    forward = [
        rank(of_pictures[p], of_captions, lambda caption, p=p: (p, caption) in together)
        for p in pictures
    ]
    backward = [
        rank(of_captions[c], of_pictures, lambda picture, c=c: (picture, c) in together)
        for c in captions
    ]
    return forward, backward


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid_loss(images, texts, logit_scale, logit_bias):
    """Sum over all pairs of the batch / its size, own pairs positive (Algorithm 1 of SigLIP)."""
    images, texts = _vectors(images), _vectors(texts)
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = logit_scale * _dot(image, text) + logit_bias
            total += softplus(-logit if i == j else logit)
    return total / len(images)


def cosines_by_kind(images, texts, image_ids, text_ids):
    """(positive, negative) cosines of all pairs; equal ids are positive."""
    images, texts = _vectors(images), _vectors(texts)
    kinds = ([], [])
    for image, image_id in zip(images, image_ids, strict=True):
        for text, text_id in zip(texts, text_ids, strict=True):
            kinds[int(image_id) != int(text_id)].append(_dot(image, text))
    return kinds


def _distance(first, second):
    cosine = _dot(first, second) / math.sqrt(_dot(first, first) * _dot(second, second))
    return (1 - cosine) / 2


def _mean_within(rows, measure):
    count = len(rows)
    total = math.fsum(
        measure(rows[i], rows[j]) for i in range(count) for j in range(count) if i != j
    )
    return total / (count * (count - 1))


def gap(images, texts):
    images, texts = _vectors(images), _vectors(texts)
    count = len(images)
    pairs = list(zip(images, texts, strict=True))
    centroids = [
        [math.fsum(column) / count for column in zip(*rows, strict=True)]
        for rows in (images, texts)
    ]
    across = math.fsum(_distance(x, y) for x, y in pairs) / count
    offsets = [[a - b for a, b in zip(x, y, strict=True)] for x, y in pairs]
    mean_offset = [math.fsum(column) / count for column in zip(*offsets, strict=True)]
    within = (_mean_within(images, _distance) + _mean_within(texts, _distance)) / 2
    return {
        "centroid_distance": math.sqrt(_squared_distance(*centroids)),
        "relative_modality_gap": across / (across + within),
        "mean_pair_distance": math.fsum(math.sqrt(_squared_distance(*p)) for p in pairs) / count,
        "alignment": math.fsum(_squared_distance(*p) for p in pairs) / count,
        "positive_cosine": math.fsum(_dot(*p) for p in pairs) / count,
        "image_cosine": _mean_within(images, _dot),
        "text_cosine": _mean_within(texts, _dot),
        "image_resultant_length": math.sqrt(_dot(centroids[0], centroids[0])),
        "text_resultant_length": math.sqrt(_dot(centroids[1], centroids[1])),
        "xi": math.fsum(_squared_distance(offset, mean_offset) for offset in offsets) / count,
        "xi_unsquared": math.fsum(math.sqrt(_dot(offset, offset)) for offset in offsets) / count
        - math.sqrt(_dot(mean_offset, mean_offset)),
    }


def uniformity(rows):
    rows = _vectors(rows)
    return math.log(_mean_within(rows, lambda x, y: math.exp(-2 * _squared_distance(x, y))))
