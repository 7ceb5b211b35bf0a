"""Self-distillation and masked prediction in plain loops, float64, from the papers."""

import math


def softmax(logits):
    """exp(z) / sum exp(z)."""
    top = max(logits)
    shares = [math.exp(value - top) for value in logits]
    return [share / sum(shares) for share in shares]


def choice(logits, centre, temperature):
    """The teacher's probabilities of one row."""
    return softmax([(g - c) / temperature for g, c in zip(logits, centre, strict=True)])


def cross_entropy(shares, logits, temperature):
    """- sum_k p_k log softmax(h / tau)_k."""
    predicted = softmax([value / temperature for value in logits])
    return -sum(p * math.log(q) for p, q in zip(shares, predicted, strict=True))


def entropy(shares):
    """- sum_k p_k log p_k."""
    return -sum(p * math.log(p) for p in shares if p > 0)


def self_distillation(teacher, views, centre, *, teacher_temperature, student_temperature):
    """Mean over views and rows; teacher (B, K), views (V, B, K)."""
    terms = [
        cross_entropy(choice(row, centre, teacher_temperature), student, student_temperature)
        for view in views
        for row, student in zip(teacher, view, strict=True)
    ]
    return sum(terms) / len(terms)


def masked_prediction(
    teacher, student, mask, centre, *, teacher_temperature, student_temperature, all_patches=False
):
    """Mean over pictures of the mean over patches that count; (B, N, K), (B, N, K), (B, N)."""
    means = []
    for theirs, ours, hidden in zip(teacher, student, mask, strict=True):
        terms = [
            cross_entropy(choice(g, centre, teacher_temperature), h, student_temperature)
            for g, h, counts in zip(theirs, ours, hidden, strict=True)
            if counts or all_patches
        ]
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def next_centre(centre, teacher, momentum):
    """mu c + (1 - mu) mean of the teacher's rows."""
    return [
        momentum * value + (1 - momentum) * sum(row[k] for row in teacher) / len(teacher)
        for k, value in enumerate(centre)
    ]


def sinkhorn(logits, temperature, rounds=3):
    """Columns to equal sums, rows to equal sums, three times; rows then sum to 1."""
    found = [[math.exp(value / temperature) for value in row] for row in logits]
    num_rows, num_columns = len(found), len(found[0])
    for _ in range(rounds):
        sums = [sum(row[k] for row in found) for k in range(num_columns)]
        found = [[q / sums[k] / num_columns for k, q in enumerate(row)] for row in found]
        found = [[q / sum(row) / num_rows for q in row] for row in found]
    return [[q * num_rows for q in row] for row in found]
