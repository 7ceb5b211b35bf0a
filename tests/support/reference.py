"""The ground truth: losses as plain loops over pairs in float64, written from the papers.

Imports nothing from the package. Slow on purpose.
"""

import math

import torch


def softplus(x):
    """log(1 + e^x), by the form that neither overflows nor loses small values."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _share(first, second):
    several = getattr(first, "ndim", 0) > 0
    pairs = zip(first, second, strict=True) if several else [(first, second)]
    return any(int(a) == int(b) for a, b in pairs)


def sigmoid_loss_and_gradients(images, texts, scale, bias, ids=None, duplicates="negative"):
    """SigLIP, Algorithm 1, over one global batch: loss and the gradients of all its arguments.

    loss = 1/N sum_ij softplus(-y_ij z_ij), z_ij = scale <u_i, v_j> + bias, y_ij = +1 iff i == j
    d loss / d z_ij = (sigmoid(z_ij) - [i == j]) / N

    A pair i != j with ids[i] == ids[j] (of several ids, any) has y_ij = +1 if duplicates ==
    "positive", and no term if duplicates == "masked". "duplicates" counts such ordered pairs.
    """
    num_duplicates = 0
    images, texts = images.double(), texts.double()
    num_pairs, width = images.shape
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    d_images = torch.zeros(num_pairs, width, dtype=torch.float64)
    d_texts = torch.zeros(num_pairs, width, dtype=torch.float64)
    for i in range(num_pairs):
        for j in range(num_pairs):
            is_positive = i == j
            if i != j and ids is not None and _share(ids[i], ids[j]):
                num_duplicates += 1
                if duplicates == "masked":
                    continue
                is_positive = duplicates == "positive"
            similarity = sum(float(images[i, k]) * float(texts[j, k]) for k in range(width))
            z = scale * similarity + bias
            loss += softplus(-z if is_positive else z)
            d_z = -sigmoid(-z) if is_positive else sigmoid(z)
            d_scale += d_z * similarity
            d_bias += d_z
            d_images[i] += d_z * scale * texts[j]
            d_texts[j] += d_z * scale * images[i]
    counted = {} if ids is None else {"duplicates": num_duplicates}
    return counted | {
        "loss": torch.tensor(loss / num_pairs, dtype=torch.float64),
        "image": d_images / num_pairs,
        "text": d_texts / num_pairs,
        "scale": torch.tensor(d_scale / num_pairs, dtype=torch.float64),
        "bias": torch.tensor(d_bias / num_pairs, dtype=torch.float64),
    }
