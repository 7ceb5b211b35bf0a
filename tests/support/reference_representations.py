"""Representation alignment as plain loops over Gram matrices in float64, from its definitions.

Imports nothing from the package. The matrices here are N x N and the masks too; the package has
neither.
"""

import math

import numpy as np


def vectors(rows):
    return [[float(value) for value in row] for row in rows]


def gram(rows):
    rows = vectors(rows)
    return [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def neighbors(rows, k):
    """The k most similar other rows of each row; of equal ones the lowest."""
    kernel = gram(rows)
    return [
        sorted((j for j in range(len(kernel)) if j != i), key=lambda j: (-kernel[i][j], j))[:k]
        for i in range(len(kernel))
    ]


def mutual_knn(first, second, k):
    pairs = zip(neighbors(first, k), neighbors(second, k), strict=True)
    return math.fsum(len(set(a) & set(b)) / k for a, b in pairs) / len(first)


def cycle_knn(first, second, k):
    there, back = neighbors(second, k), neighbors(first, k)
    hits = [any(i in back[j] for j in there[i]) for i in range(len(first))]
    return sum(hits) / len(hits)


def biased_hsic(kernel, other):
    """tr(K H L H), by matrices."""
    count = len(kernel)
    center = np.eye(count) - 1 / count
    return float(np.trace(np.array(kernel) @ center @ np.array(other) @ center))


def unbiased_hsic(kernel, other):
    """Equation 5 of Song et al., by loops; diagonals do not count."""
    count = len(kernel)
    places = range(count)
    kernel = [[0.0 if i == j else float(kernel[i][j]) for j in places] for i in places]
    other = [[0.0 if i == j else float(other[i][j]) for j in places] for i in places]
    products = math.fsum(kernel[i][j] * other[j][i] for i in places for j in places)
    sums = math.fsum(map(math.fsum, kernel)) * math.fsum(map(math.fsum, other))
    chained = math.fsum(
        math.fsum(kernel[i][j] for i in places) * math.fsum(other[j]) for j in places
    )
    total = products + sums / ((count - 1) * (count - 2)) - 2 * chained / (count - 2)
    return total / (count * (count - 3))


def brute_unbiased_hsic(kernel, other):
    """The U-statistic itself: the mean over all ordered quadruples of distinct rows."""
    count = len(kernel)
    total, number = 0.0, 0
    for i in range(count):
        for j in range(count):
            for q in range(count):
                for r in range(count):
                    if len({i, j, q, r}) == 4:
                        number += 1
                        total += kernel[i][j] * (other[i][j] + other[q][r] - 2 * other[i][q])
    return total / number


def kernel_alignment(first, second, hsic, *, added=0.0):
    """``added`` to the root, as platonic-rep does with 1e-6."""
    kernel, other = gram(first), gram(second)
    root = math.sqrt(hsic(kernel, kernel) * hsic(other, other))
    return hsic(kernel, other) / (root + added)


def _masked(kernel, mask):
    places = range(len(kernel))
    return [[kernel[i][j] * mask[i][j] for j in places] for i in places]


def cknna(first, second, k):
    kernels = gram(first), gram(second)
    masks = [
        [[j in near[i] for j in range(len(rows))] for i in range(len(rows))]
        for rows, near in ((rows, neighbors(rows, k)) for rows in (first, second))
    ]

    def similarity(a, b):
        places = range(len(first))
        both = [[masks[a][i][j] and masks[b][i][j] for j in places] for i in places]
        return unbiased_hsic(_masked(kernels[a], both), _masked(kernels[b], both))

    return similarity(0, 1) / math.sqrt(similarity(0, 0) * similarity(1, 1))


def svcca(first, second, dimensions, *, standardize):
    """Singular vectors by numpy, canonical correlations from orthonormal bases."""
    bases = []
    for rows in (np.array(vectors(first)), np.array(vectors(second))):
        if standardize:
            rows = rows - rows.mean(axis=0)
            rows = rows / rows.std(axis=0)
        left = np.linalg.svd(rows, full_matrices=False)[0][:, :dimensions]
        bases.append(np.linalg.qr(left - left.mean(axis=0))[0])
    return float(np.linalg.svd(bases[0].T @ bases[1])[1].mean())


def center_normalize(rows):
    rows = np.array(vectors(rows))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows - rows.mean(axis=0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def matched_correlation(first, second):
    """Best of all one-to-one matchings of columns, by trying every one."""
    from itertools import permutations

    first, second = np.array(vectors(first)), np.array(vectors(second))
    affinity = first.T @ second
    columns = range(affinity.shape[1])
    best = max(
        sum(affinity[row, column] for row, column in enumerate(order))
        for order in permutations(columns, affinity.shape[0])
    )
    return best / (np.linalg.norm(first) * np.linalg.norm(second))
