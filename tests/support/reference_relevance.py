"""The ground truth of losses and margins over a relevance matrix: plain loops in float64.

Written from the papers; imports nothing from the package. Slow on purpose.
"""

import math

import torch

from tests.support.reference import sigmoid, softplus


def _products(queries, documents):
    rows, columns = queries.double().tolist(), documents.double().tolist()
    return [[sum(a * b for a, b in zip(u, v, strict=True)) for v in columns] for u in rows]


def relevance_sigmoid_and_gradients(queries, documents, relevance, scale, bias):
    """loss = 1/Q sum_qn softplus(-y_qn z_qn), z = scale <u_q, v_n> + bias, y = +1 iff relevant."""
    products = _products(queries, documents)
    pulls = [
        [
            -sigmoid(-(scale * s + bias)) if relevance[q, n] else sigmoid(scale * s + bias)
            for n, s in enumerate(row)
        ]
        for q, row in enumerate(products)
    ]
    loss = sum(
        softplus(-(scale * s + bias) if relevance[q, n] else scale * s + bias)
        for q, row in enumerate(products)
        for n, s in enumerate(row)
    )
    result = _gradients(queries, documents, products, pulls, scale, len(queries))
    return result | {
        "loss": _number(loss / len(queries)),
        "bias": _number(sum(map(sum, pulls)) / len(queries)),
    }


def relevance_softmax_and_gradients(queries, documents, relevance, scale):
    """loss = 1/P sum over relevant (q, p) of (log sum_n exp(z_qn) - z_qp), z = scale <u_q, v_n>."""
    products = _products(queries, documents)
    positives = int(relevance.sum())
    loss, pulls = 0.0, []
    for q, row in enumerate(products):
        answers = [n for n in range(len(row)) if relevance[q, n]]
        largest = max(scale * s for s in row)
        log_sum = largest + math.log(sum(math.exp(scale * s - largest) for s in row))
        loss += sum(log_sum - scale * row[n] for n in answers)
        pulls.append(
            [
                len(answers) * math.exp(scale * s - log_sum) - (n in answers)
                for n, s in enumerate(row)
            ]
        )
    result = _gradients(queries, documents, products, pulls, scale, positives)
    return result | {"loss": _number(loss / positives)}


def _gradients(queries, documents, products, pulls, scale, divisor):
    d_queries = torch.zeros(queries.shape, dtype=torch.float64)
    d_documents = torch.zeros(documents.shape, dtype=torch.float64)
    d_scale = 0.0
    for q, row in enumerate(pulls):
        for n, pull in enumerate(row):
            d_queries[q] += pull * scale * documents[n].double() / divisor
            d_documents[n] += pull * scale * queries[q].double() / divisor
            d_scale += pull * products[q][n] / divisor
    return {"queries": d_queries, "documents": d_documents, "scale": _number(d_scale)}


def relevance_margins(queries, documents, relevance):
    """Global margin, its threshold, smallest row margin and share of the answers in the top k."""
    products = _products(queries, documents)
    rows, hits = [], 0
    for q, row in enumerate(products):
        answers = [s for n, s in enumerate(row) if relevance[q, n]]
        others = [s for n, s in enumerate(row) if not relevance[q, n]]
        if not answers:
            continue
        rows.append((min(answers), max(others, default=-math.inf)))
        top = sorted(range(len(row)), key=lambda n: -row[n])[: len(answers)]
        hits += sum(bool(relevance[q, n]) for n in top)
    every_other = [
        s for q, row in enumerate(products) for n, s in enumerate(row) if not relevance[q, n]
    ]
    lowest, highest = min(low for low, _ in rows), max(every_other, default=-math.inf)
    return {
        "margin": (lowest - highest) / 2,
        "relative_bias": (lowest + highest) / 2,
        "row_margin": min((low - high) / 2 for low, high in rows),
        "top_k_accuracy": hits / int(relevance.sum()),
    }


def _number(value):
    return torch.tensor(value, dtype=torch.float64)
