"""A dual encoder for benchmarks whose features are known by hand, without any weights.

A text is its characters, a picture its mean colour; both pass through one fixed random map each.
"""

import torch

from dist_siglip.evaluation import EvaluatedModel
from tests.support.shards import tiny_inputs

WIDTH = 6


def unit(rows):
    # In float64 until here, so that equal inputs have equal features in any batch.
    return torch.nn.functional.normalize(rows, dim=-1).float()


def text_map(tokens):
    """(B, 24) code points to (B, WIDTH)."""
    weights = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return unit(torch.sin(tokens.double()) @ weights)


def image_map(pixels):
    """(B, 3, H, W) uint8 to (B, WIDTH)."""
    weights = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    halves = pixels.double().unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean(dim=(3, 5))
    return unit(torch.sin(halves.flatten(1) / 9) @ weights)


def known_model(calls=None):
    """Model of the maps above; counts the rows of every call in the list ``calls``."""

    def counted(name, function):
        def encode(rows):
            if calls is not None:
                calls.append((name, len(rows)))
            return function(rows)

        return encode

    inputs = tiny_inputs()
    return EvaluatedModel(
        counted("image", image_map),
        counted("text", text_map),
        inputs.tokenizer,
        inputs,
        10.0,
        -5.0,
        torch.device("cpu"),
    )
