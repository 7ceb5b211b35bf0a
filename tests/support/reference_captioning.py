"""A caption decoder and its loss in plain loops, float64, from the papers."""

import math

import numpy as np


def cross_entropy(logits, label):
    """-log softmax(logits)[label]."""
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits)) - logits[label]


def caption_loss(logits, labels, is_target):
    """Mean over captions of the mean over their targets; (B, L, V), (B, L), (B, L)."""
    means = []
    for rows, row_labels, targets in zip(logits, labels, is_target, strict=True):
        losses = [
            cross_entropy(list(row), label)
            for row, label, counts in zip(rows, row_labels, targets, strict=True)
            if counts
        ]
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def task_row(task, text, region_text, box, *, num_words, num_bins, end):
    """Ids of a row of a task, and which of them are to be written; None without a region.

    A row of the tokenizer has one token before the text; ``end`` is the one behind it.
    """
    if task == "caption":
        return text, [0 < place <= text.index(end) for place in range(len(text))]
    if not box[2] > box[0]:
        return None
    sides = [num_words + min(math.floor(side * num_bins), num_bins - 1) for side in box]
    is_text = [0 < place <= region_text.index(end) for place in range(len(region_text))]
    if task == "referring":
        return region_text + sides, is_text + [True] * 4
    return sides + region_text, [True] * 4 + is_text


def box_overlap(box, other):
    """Intersection over union of two boxes (top, left, bottom, right)."""
    rows = min(box[2], other[2]) - max(box[0], other[0])
    columns = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(rows, 0) * max(columns, 0)
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return shared / (sum(areas) - shared)


def decode(state, texts, tokens, is_parallel, *, heads, mask_id, start_id=0):
    """Logits (B, L, V) of a decoder by its state_dict (names of the package, values float64)."""
    state = {name: value.numpy() for name, value in state.items()}
    found = []
    for text, patches, parallel in zip(
        texts.tolist(), tokens.numpy(), is_parallel.tolist(), strict=True
    ):
        inputs = [mask_id] * len(text) if parallel else [start_id, *text[:-1]]
        stream = np.stack(
            [
                state["decoder.embedding.weight"][token] + state["decoder.positions"][place]
                for place, token in enumerate(inputs)
            ]
        )
        layer = 0
        while f"decoder.blocks.{layer}.self_norm.weight" in state:
            stream = _block(state, f"decoder.blocks.{layer}.", stream, patches, parallel, heads)
            layer += 1
        hidden = _norm(state, "decoder.norm", stream)
        found.append(hidden @ state["output.weight"].T + state["output.bias"])
    return np.stack(found)


def _block(state, prefix, stream, patches, parallel, heads):
    normed = _norm(state, prefix + "self_norm", stream)
    reach = [len(stream) if parallel else place + 1 for place in range(len(stream))]
    stream = stream + _attend(state, prefix + "self_attention", normed, normed, reach, heads)
    normed = _norm(state, prefix + "cross_norm", stream)
    whole = [len(patches)] * len(stream)
    stream = stream + _attend(state, prefix + "cross_attention", normed, patches, whole, heads)
    inner = _linear(state, prefix + "mlp.1", _norm(state, prefix + "mlp.0", stream))
    inner = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(inner)
    return stream + _linear(state, prefix + "mlp.3", inner)


def _attend(state, name, queries, seen, reach, heads):
    query = _linear(state, name + ".query", queries)
    key, value = np.split(_linear(state, name + ".key_value", seen), 2, axis=1)
    size = query.shape[1] // heads
    mixed = np.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for place, end in enumerate(reach):
            scores = [query[place, part] @ key[j, part] / math.sqrt(size) for j in range(end)]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            mixed[place, part] = sum(weights[j] * value[j, part] for j in range(end))
    return _linear(state, name + ".out", mixed)


def _linear(state, name, rows):
    return rows @ state[name + ".weight"].T + state[name + ".bias"]


def _norm(state, name, rows):
    centred = rows - rows.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return centred / spread * state[name + ".weight"] + state[name + ".bias"]
