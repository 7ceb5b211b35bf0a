"""A fusion head, its loss, its hard pairs and re-ranking as plain loops in float64.

Written from the definitions; imports nothing of the package.
"""

import math


def head_logit(state, config, image, text):
    """Logit of one pair.

    Args:
        state: name -> nested lists of the head's state.
        config: direction, heads, layers.
        image: (features, tokens, is_token) as lists.
        text: likewise.
    """
    sides = {name: _inputs(state, name, row) for name, row in (("image", image), ("text", text))}
    layers = {
        "image": 0 if config.direction == "text_to_image" else config.layers,
        "text": 0 if config.direction == "image_to_text" else config.layers,
    }
    first = _stream(state, "image_stream.", config, layers["image"], sides["image"], sides["text"])
    second = _stream(state, "text_stream.", config, layers["text"], sides["text"], sides["image"])
    product = [a * b for a, b in zip(first, second, strict=True)]
    return _linear(state, "match.", first + second + product)[0]


def score(state, config, image, text):
    """What one pair is re-ranked by: see ``head_logit``."""
    similarity = _dot(image[0], text[0])
    alone = state["dual_scale"][0] * similarity + state["dual_bias"][0]
    return alone + config.rerank_weight * head_logit(state, config, image, text)


def match_loss(positives, negatives):
    """Loss of a batch on one rank: over all its positives and chosen negatives."""
    total = sum(math.log1p(math.exp(-z)) for z in positives)
    total += sum(math.log1p(math.exp(z)) for z in negatives)
    return total / len(positives)


def hard_pairs(image_features, text_features, ids, num_hard, num_easy):
    """(image, text) of every chosen pair: positives, hardest partners, texts of the next pairs.

    ``ids`` has the caption and the picture of each row; rows that share one are no wrong partners.
    """
    count = range(len(ids))

    def is_wrong(one, other):
        return all(a != b for a, b in zip(ids[one], ids[other], strict=True))

    def hardest(query, keys, row):
        allowed = [key for key in count if is_wrong(key, row)]
        return sorted(allowed, key=lambda key: (-_dot(query[row], keys[key]), key))[:num_hard]

    pairs = [(row, row) for row in count]
    for row in count:
        pairs += [(row, text) for text in hardest(image_features, text_features, row)]
    for row in count:
        pairs += [(image, row) for image in hardest(text_features, image_features, row)]
        following = [(row + step) % len(ids) for step in range(1, num_easy + 1)]
        pairs += [(row, text) for text in following if is_wrong(text, row)]
    return pairs


def reranked_rank(similarities, scores, is_relevant, k):
    """Rank of the best relevant item of one query, ties against it."""
    order = sorted(range(len(similarities)), key=lambda item: -similarities[item])
    border = similarities[order[k]] if k < len(order) else -math.inf
    candidates = [item for item in order[:k] if similarities[item] > border]
    hits = [item for item in candidates if is_relevant[item]]
    if hits:
        best = max(scores[item] for item in hits)
        return 1 + sum(scores[i] >= best and not is_relevant[i] for i in candidates)
    best = max((similarities[i] for i in order if is_relevant[i]), default=-math.inf)
    return 1 + sum(similarities[i] >= best and not is_relevant[i] for i in order)


def _inputs(state, side, row):
    _, tokens, is_token = row
    prefix = f"{side}_input."
    found = []
    for position, token in zip(state[f"{prefix}positions"], tokens, strict=True):
        projected = _linear(state, f"{prefix}proj.", _norm(state, f"{prefix}norm.", token))
        found.append(_add(projected, position))
    return found, is_token


def _stream(state, prefix, config, layers, own, other):
    (stream, own_mask), (looked_at, other_mask) = own, other
    for layer in range(layers):
        block = f"{prefix}blocks.{layer}."
        normed = [_norm(state, f"{block}self_norm.", token) for token in stream]
        name = f"{block}self_attention."
        found = _attention(state, name, config.heads, normed, normed, own_mask)
        stream = [_add(*pair) for pair in zip(stream, found, strict=True)]
        normed = [_norm(state, f"{block}cross_norm.", token) for token in stream]
        seen = [_norm(state, f"{block}other_norm.", token) for token in looked_at]
        name = f"{block}cross_attention."
        found = _attention(state, name, config.heads, normed, seen, other_mask)
        stream = [_add(*pair) for pair in zip(stream, found, strict=True)]
        stream = [_add(token, _mlp(state, f"{block}mlp.", token)) for token in stream]
    stream = [_norm(state, f"{prefix}norm.", token) for token in stream]
    query = state[f"{prefix}query"][0]
    return _attention(state, f"{prefix}pool.", config.heads, query, stream, own_mask)[0]


def _attention(state, prefix, heads, queries, tokens, mask):
    width = len(queries[0])
    size = width // heads
    asked = [_linear(state, f"{prefix}query.", row) for row in queries]
    answers = [_linear(state, f"{prefix}key_value.", row) for row in tokens]
    keys, values = [row[:width] for row in answers], [row[width:] for row in answers]
    visible = [index for index, seen in enumerate(mask) if seen]
    found = []
    for query in asked:
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            exponents = [
                math.exp(_dot(query[own], keys[t][own]) / math.sqrt(size)) for t in visible
            ]
            for channel in range(own.start, own.stop):
                column = [values[t][channel] for t in visible]
                mixed.append(_dot(exponents, column) / sum(exponents))
        found.append(_linear(state, f"{prefix}out.", mixed))
    return found


def _mlp(state, prefix, token):
    hidden = _linear(state, f"{prefix}1.", _norm(state, f"{prefix}0.", token))
    hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden]
    return _linear(state, f"{prefix}4.", hidden)


def _norm(state, prefix, row):
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
    scaled = [(x - mean) / math.sqrt(variance + 1e-5) for x in row]
    return [x * w + b for x, w, b in zip(scaled, weight, bias, strict=True)]


def _linear(state, prefix, row):
    weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
    return [_dot(w, row) + b for w, b in zip(weight, bias, strict=True)]


def _add(first, second):
    return [a + b for a, b in zip(first, second, strict=True)]


def _dot(first, second):
    return sum(a * b for a, b in zip(first, second, strict=True))
