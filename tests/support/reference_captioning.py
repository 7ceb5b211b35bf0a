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


def decode(state, texts, tokens, is_parallel, *, heads, mask_id):
    """Logits (B, L, V) of a decoder by its state_dict (names of the package, values float64)."""
    state = {name: value.numpy() for name, value in state.items()}
    found = []
    for text, patches, parallel in zip(
        texts.tolist(), tokens.numpy(), is_parallel.tolist(), strict=True
    ):
        inputs = [mask_id] * len(text) if parallel else [0, *text[:-1]]
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
