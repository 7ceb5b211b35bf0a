"""Neighbours, spectra and directions of embeddings as plain loops in float64.

Imports nothing from the package; takes lists of lists or tensors.
"""

import math


def vectors(rows):
    return [[float(value) for value in row] for row in rows]


def dot(first, second):
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


def nearest(queries, keys, k, query_ids=None, key_ids=None):
    """(similarity, position) of the k best keys per query; equal ids are left out."""
    queries, keys = vectors(queries), vectors(keys)
    found = []
    for number, query in enumerate(queries):
        allowed = [
            (-round(dot(query, key), 12), position)
            for position, key in enumerate(keys)
            if query_ids is None or int(query_ids[number]) != int(key_ids[position])
        ]
        best = [(-score, position) for score, position in sorted(allowed)[:k]]
        found.append(best + [(-math.inf, -1)] * (k - len(best)))
    return found


def row_margins(rows, columns, row_ids, column_ids):
    """Half gap of each row between its worst positive and its best negative; NaN without one."""
    rows, columns = vectors(rows), vectors(columns)
    found = []
    for row, row_id in zip(rows, row_ids, strict=True):
        kinds = ([], [])
        for column, column_id in zip(columns, column_ids, strict=True):
            kinds[int(row_id) == int(column_id)].append(dot(row, column))
        negative, positive = kinds
        both = positive and negative
        found.append((min(positive) - max(negative)) / 2 if both else math.nan)
    return found


def cross_uniformity(images, texts):
    images, texts = vectors(images), vectors(texts)
    kernels = [
        math.exp(-2 * math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
        for i, x in enumerate(images)
        for j, y in enumerate(texts)
        if i != j
    ]
    return math.log(math.fsum(kernels) / len(kernels))


def scatter(rows):
    """Centred second moments, entry by entry."""
    rows = vectors(rows)
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [
        [math.fsum((row[a] - means[a]) * (row[b] - means[b]) for row in rows) for b in range(width)]
        for width in [len(means)]
        for a in range(width)
    ]


def occurrences(queries, keys, k):
    counts = [0] * len(keys)
    for row in nearest(queries, keys, k):
        for _, position in row:
            counts[position] += position >= 0
    return counts


def skewness(counts):
    mean = math.fsum(counts) / len(counts)
    moments = [
        math.fsum((count - mean) ** power for count in counts) / len(counts) for power in (2, 3)
    ]
    return moments[1] / moments[0] ** 1.5


def wrong_first_items(images, texts):
    """Images whose own text is not strictly the nearest one."""
    images, texts = vectors(images), vectors(texts)
    return sum(
        any(dot(x, texts[j]) >= dot(x, texts[i]) for j in range(len(texts)) if j != i)
        for i, x in enumerate(images)
    )
