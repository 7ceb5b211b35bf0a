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
