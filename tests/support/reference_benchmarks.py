"""Classification and retrieval as plain loops in float64, from their definitions alone."""

import math


def _vectors(rows):
    return [[float(value) for value in row] for row in rows]


def _dot(first, second):
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


def class_vector(prompts):
    """Mean of unit rows, at length 1."""
    mean = [math.fsum(column) / len(prompts) for column in zip(*_vectors(prompts), strict=True)]
    length = math.sqrt(_dot(mean, mean))
    return [value / length for value in mean]


def accuracies(images, classes, labels):
    """acc1, acc5 and mean_per_class_recall; the lower number wins among equals."""
    ranks = []
    for image, label in zip(_vectors(images), labels, strict=True):
        scores = [_dot(image, vector) for vector in classes]
        order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
        ranks.append(order.index(label) + 1)
    by_class = {}
    for rank, label in zip(ranks, labels, strict=True):
        by_class.setdefault(label, []).append(rank == 1)
    recalls = [sum(hits) / len(hits) for hits in by_class.values()]
    return {
        "acc1": sum(rank <= 1 for rank in ranks) / len(ranks),
        "acc5": sum(rank <= 5 for rank in ranks) / len(ranks),
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }


def recall(queries, gallery, query_ids, gallery_ids, k):
    """Share of queries with one of their own among the k most similar; ties are lost."""
    queries, gallery, hits = _vectors(queries), _vectors(gallery), 0
    for query, query_id in zip(queries, query_ids, strict=True):
        scores = [_dot(query, item) for item in gallery]
        own = [s for s, i in zip(scores, gallery_ids, strict=True) if i == query_id]
        others = [s for s, i in zip(scores, gallery_ids, strict=True) if i != query_id]
        hits += 1 + sum(score >= max(own) - 1e-9 for score in others) <= k
    return hits / len(queries)
