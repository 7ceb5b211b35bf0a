"""The ground truth of softmax, alignment, uniformity and their sums: plain loops in float64.

Written from the papers; imports nothing from the package. Slow on purpose. Each function returns
the loss and the gradients of its arguments by name.
"""

import math

import torch

from tests.support.reference import sigmoid, sigmoid_loss_and_gradients, softplus


def _dot(one, other):
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def _log_sum_exp(values):
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def softmax_loss_and_gradients(images, texts, scale):
    """InfoNCE in both directions, Radford et al., figure 3.

    loss = 1/(2N) sum_i (lse_j z_ij - z_ii + lse_j z_ji - z_ii), z_ij = scale <u_i, v_j>
    d loss / d z_ij = (softmax of row i at j + softmax of column j at i - 2 [i == j]) / (2N)
    """
    images, texts = images.double(), texts.double()
    pairs = range(len(images))
    products = [[_dot(images[i], texts[j]) for j in pairs] for i in pairs]
    z = [[scale * products[i][j] for j in pairs] for i in pairs]
    by_row = [_log_sum_exp([z[i][j] for j in pairs]) for i in pairs]
    by_column = [_log_sum_exp([z[i][j] for i in pairs]) for j in pairs]
    loss = sum(by_row[i] + by_column[i] - 2 * z[i][i] for i in pairs) / (2 * len(images))
    d_images, d_texts, d_scale = torch.zeros_like(images), torch.zeros_like(texts), 0.0
    for i in pairs:
        for j in pairs:
            d_z = math.exp(z[i][j] - by_row[i]) + math.exp(z[i][j] - by_column[j])
            d_z = (d_z - 2 * (i == j)) / (2 * len(images))
            d_images[i] += d_z * scale * texts[j]
            d_texts[j] += d_z * scale * images[i]
            d_scale += d_z * products[i][j]
    return {"loss": _number(loss), "image": d_images, "text": d_texts, "scale": _number(d_scale)}


def alignment_and_gradients(images, texts):
    """loss = 1/N sum_i |u_i - v_i|^2, Wang and Isola with alpha = 2."""
    images, texts = images.double(), texts.double()
    num_pairs = len(images)
    loss = 0.0
    d_images, d_texts = torch.zeros_like(images), torch.zeros_like(texts)
    for i in range(num_pairs):
        between = images[i] - texts[i]
        loss += _dot(between, between) / num_pairs
        d_images[i] += 2 * between / num_pairs
        d_texts[i] -= 2 * between / num_pairs
    return {"loss": _number(loss), "image": d_images, "text": d_texts}


def cross_uniformity_and_gradients(images, texts):
    """loss = log( 1/(N (N-1)) sum_{i != j} exp(-2 |u_i - v_j|^2) )."""
    images, texts = images.double(), texts.double()
    num_pairs = len(images)
    total = 0.0
    d_images, d_texts = torch.zeros_like(images), torch.zeros_like(texts)
    for i in range(num_pairs):
        for j in range(num_pairs):
            if i == j:
                continue
            between = images[i] - texts[j]
            kernel = math.exp(-2 * _dot(between, between))
            total += kernel
            d_images[i] -= 4 * kernel * between
            d_texts[j] += 4 * kernel * between
    return {
        "loss": _number(math.log(total / (num_pairs * (num_pairs - 1)))),
        "image": d_images / total,
        "text": d_texts / total,
    }


def uniformity_and_gradients(features, name="image"):
    """loss = log( 2/(N (N-1)) sum_{i < j} exp(-2 |x_i - x_j|^2) ), Wang and Isola with t = 2."""
    features = features.double()
    num_rows = len(features)
    total = 0.0
    gradient = torch.zeros_like(features)
    for j in range(num_rows):
        for i in range(j):
            between = features[i] - features[j]
            kernel = math.exp(-2 * _dot(between, between))
            total += kernel
            gradient[i] -= 4 * kernel * between
            gradient[j] += 4 * kernel * between
    loss = math.log(2 * total / (num_rows * (num_rows - 1)))
    return {"loss": _number(loss), name: gradient / total}


def weighted_sum(*weighted):
    """Add (weight, reference) pairs, loss and gradients alike."""
    result = {}
    for weight, reference in weighted:
        for name, value in reference.items():
            result[name] = result.get(name, 0) + weight * value
    return result


def multimodal_loss_and_gradients(features, scale, bias, edges):
    """Mean over edges (a, b) of the sigmoid loss of features a and b; features by name."""
    parts = []
    for a, b in edges:
        edge = sigmoid_loss_and_gradients(features[a], features[b], scale, bias)
        edge[a], edge[b] = edge.pop("image"), edge.pop("text")
        parts.append((1 / len(edges), edge))
    return weighted_sum(*parts)


def _number(value):
    return torch.tensor(value, dtype=torch.float64)


def mined_sigmoid_and_gradients(images, texts, scale, bias, k, weight, ids=None, duplicates=None):
    """Sigmoid loss in which the k hardest negatives of each image count ``weight`` times more.

    loss = 1/N sum_i (sum_j softplus(-y_ij z_ij) + weight sum_{j in H_i} softplus(z_ij))

    H_i: of the j != i with ids[j] != ids[i] those with the largest round(2^16 <u_i, v_j>), of equal
    ones the first. Duplicates are "positive", "masked" or "negative" in the first sum.
    """
    images, texts = images.double(), texts.double()
    pairs, n = range(len(images)), len(images)
    rows, columns = images.tolist(), texts.tolist()
    s = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in columns] for u in rows]
    d_z, loss = [[0.0] * n for _ in pairs], 0.0
    for i in pairs:
        is_equal = [i != j and ids is not None and ids[i] == ids[j] for j in pairs]
        others = [j for j in pairs if j != i and not is_equal[j]]
        mined = sorted(others, key=lambda j, i=i: (-round(s[i][j] * 2**16), j))[:k]
        for j in pairs:
            z = scale * s[i][j] + bias
            if not (is_equal[j] and duplicates == "masked"):
                is_positive = i == j or (is_equal[j] and duplicates == "positive")
                loss += softplus(-z if is_positive else z) / n
                d_z[i][j] += (-sigmoid(-z) if is_positive else sigmoid(z)) / n
            if j in mined:
                loss += weight * softplus(z) / n
                d_z[i][j] += weight * sigmoid(z) / n
    d = torch.tensor(d_z, dtype=torch.float64)
    found = {
        "loss": loss,
        "image": scale * d @ texts,
        "text": scale * d.T @ images,
        "scale": sum(d_z[i][j] * s[i][j] for i in pairs for j in pairs),
        "bias": float(d.sum()),
    }
    return {name: torch.as_tensor(each, dtype=torch.float64) for name, each in found.items()}
