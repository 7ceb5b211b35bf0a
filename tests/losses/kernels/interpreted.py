"""Run by Triton's interpreter, in a process of its own: ``TRITON_INTERPRET=1 python -m ... OUT``.

Writes what the kernels give on a CPU; ``test_triton_terms`` compares it with loops in float64.
"""

import sys
from itertools import product

import torch
import torch.nn.functional as F

from dist_siglip.losses import (
    cross_uniformity_loss,
    matryoshka_sigmoid_loss,
    matryoshka_softmax_loss,
    relevance_sigmoid_loss,
    siglip_loss,
    softmax_loss,
    uniformity_loss,
)
from tests.support.parity import LAYOUTS, global_result, layouts_of, local_rows, make_rows
from tests.support.processes import run_ranks
from tests.support.reference_matryoshka import BIASES, DIMS, SCALES, WEIGHTS

SHAPES = ((1, 1), (5, 3), (9, 260))
DIAGONALS = (None, 0, 3, -2)
DUPLICATES = ("positive", "masked", "negative")
LOGITS = [*range(-30, 31), -86.0, -88.0, -200.0, 40.0, 200.0, 1e-30, -1e-30, 0.3, -0.7]
SCALE, BIAS = 7.0, -3.0
NAMES = {
    "sigmoid": ("image", "text", "scale", "bias"),
    "duplicates": ("image", "text", "scale", "bias"),
    "mined": ("image", "text", "scale", "bias"),
    "softmax": ("image", "text", "scale"),
    "uniformity": ("image",),
    "cross_uniformity": ("image", "text"),
    "relevance": ("image", "text", "scale", "bias"),
    "sigmoid at prefixes": ("image", "text", "scale", "bias"),
    "softmax at prefixes": ("image", "text", "scale"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sigmoid_cases():
    """(shape, kinds of ids, duplicates, diagonal, relevance, dtype) of tiles."""
    for shape, diagonal in product(SHAPES, DIAGONALS):
        yield shape, 0, "negative", diagonal, False, torch.float32
    for shape, kinds, duplicates, diagonal in product(SHAPES[1:], (1, 2), DUPLICATES, (None, 0)):
        yield shape, kinds, duplicates, diagonal, False, torch.float32
    for dtype in DTYPES[:2]:
        yield SHAPES[2], 0, "negative", None, True, dtype


def sigmoid_inputs(shape, kinds):
    """Similarities, ids of rows and columns and relevance; the same on both sides."""
    generator = torch.Generator().manual_seed(sum(shape) + kinds)
    products = torch.rand(shape, generator=generator) * 4 - 2
    # Every second of more: neither side lies in one piece.
    ids = [torch.randint(4, (2 * size, kinds), generator=generator)[::2] for size in shape]
    relevant = torch.rand(shape, generator=generator) < 0.2
    return products, *(side.squeeze(1) if kinds == 1 else side for side in ids), relevant


def features(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, 6, generator=generator), dim=-1)


def of_tiles():
    """What every kernel gives on single tiles."""
    from dist_siglip.losses.kernels import triton_terms
    from dist_siglip.losses.kernels.gaussian_tiles import GaussianTiles
    from dist_siglip.losses.kernels.softmax_tiles import NegativeSumTiles, SoftmaxTiles

    found = {}
    scale, bias = torch.tensor(SCALE), torch.tensor(BIAS)
    for case in sigmoid_cases():
        shape, kinds, duplicates, diagonal, with_relevance, dtype = case
        products, rows, columns, relevant = sigmoid_inputs(shape, kinds)
        derivative = products if dtype == torch.float32 else torch.empty(shape, dtype=dtype)
        sums = triton_terms.sums_buffer(*shape, triton_terms.TERMS_BLOCK, torch.device("cpu"))
        triton_terms.add_sigmoid_terms(
            products,
            derivative,
            sums,
            scale,
            bias,
            rows if kinds else None,
            columns if kinds else None,
            diagonal,
            duplicates,
            relevant if with_relevance else None,
        )
        found["sigmoid", case] = sums.sum(dim=0), derivative
    one, zero = torch.ones(()), torch.zeros(())
    for logit in LOGITS:
        tile = torch.full((1, 1), float(logit))
        sums = triton_terms.sums_buffer(1, 1, triton_terms.TERMS_BLOCK, torch.device("cpu"))
        triton_terms.add_sigmoid_terms(tile, tile, sums, one, zero, None, None, None, "negative")
        found["logit", logit] = sums[0, 0], tile[0, 0]
    tile, sums = torch.full((1, 1), torch.nan), torch.zeros_like(sums)
    triton_terms.add_sigmoid_terms(tile, None, sums, one, zero, None, None, None, "negative")
    found["nan"] = sums[0, 0]
    for (num_rows, num_columns), diagonal in product(((3, 2), (40, 150)), (None, 0, 1)):
        home, others = features(num_rows, 0), features(num_columns, 1)
        case = num_rows, num_columns, diagonal
        largest, rows = (num_rows, num_columns), slice(0, num_rows)
        passes = {}
        for kernel in ("triton", "eager"):
            first = NegativeSumTiles(home, largest, 10 * one, kernel=kernel)
            of_columns = torch.full((num_columns,), -torch.inf)
            for _ in range(2):  # the second is added to the first
                first.add(rows, others, of_columns, diagonal=diagonal)
            second = SoftmaxTiles(
                home, largest, 10 * one, 5 + home[:, 0], -home[:, 1], with_scale=True, kernel=kernel
            )
            derivative = second.derivative(rows, others, 5 + others[:, 0], diagonal=diagonal)
            gaussian = GaussianTiles(home, largest, kernel=kernel)
            tile = gaussian.tile(home, others, diagonal=diagonal)
            passes[kernel] = (
                *first.sums,
                of_columns,
                derivative,
                second.scale_sum(),
                *tile,
                gaussian.value(),
            )
        found["others", case] = passes
    return found


def call(name, dtype, settings, layout, rank):
    """Global result of one loss with the interpreted kernels."""
    num_rows = sum(layout)
    rows = local_rows(make_rows(("image", "text"), num_rows, dtype), layout, rank)
    values = {**rows, **scalars_of(name)}
    arguments = {key: values[key].requires_grad_() for key in NAMES[name]}
    start = sum(layout[:rank])
    mine = slice(start, start + layout[rank])

    return global_result(loss_of(name, num_rows, mine, settings), arguments)


def scalars_of(name, dtype=torch.float32):
    """Scale and bias; of prefixes one each."""
    scales, biases = [SCALE], [BIAS]
    if name.endswith("at prefixes"):
        order = sorted(DIMS, reverse=True)
        scales, biases = [SCALES[dim] for dim in order], [BIASES[dim] for dim in order]
    return {"scale": torch.tensor(scales, dtype=dtype), "bias": torch.tensor(biases, dtype=dtype)}


def loss_of(name, num_rows, mine, settings, device="cpu"):
    """The loss of that name as a function of its arguments by name."""

    def loss(image, text=None, scale=None, bias=None):
        if name == "sigmoid at prefixes":
            prefixes = {"dims": DIMS, "weights": WEIGHTS, **settings}
            return matryoshka_sigmoid_loss(image, text, scale, bias, **prefixes).loss
        if name == "softmax at prefixes":
            prefixes = {"dims": DIMS, "weights": WEIGHTS, **settings}
            return matryoshka_softmax_loss(image, text, scale, **prefixes)
        if name == "softmax":
            return softmax_loss(image, text, scale, **settings)
        if name == "uniformity":
            return uniformity_loss(image, **settings)
        if name == "cross_uniformity":
            return cross_uniformity_loss(image, text, **settings)
        if name == "relevance":
            relevance = relevance_of(num_rows)[mine].to(device)
            return relevance_sigmoid_loss(image, text, relevance, scale, bias, **settings)
        ids = ids_of(num_rows)[mine].to(device) if name in ("duplicates", "mined") else None
        mined = {"mined_negatives": 2, "mined_weight": 3.0} if name == "mined" else {}
        return siglip_loss(image, text, scale, bias, caption_ids=ids, **mined, **settings)

    return loss


def ids_of(num_rows):
    return torch.arange(num_rows) % 3


def relevance_of(num_rows):
    return (torch.arange(num_rows)[:, None] + torch.arange(num_rows)) % 3 == 0


def of_losses(rank, world_size):
    """Every loss on the layouts of this many ranks."""
    found = {}
    for layout, name in product(layouts_of(world_size), NAMES):
        for dtype in DTYPES if layout.startswith("uneven") else DTYPES[:1]:
            settings = {"kernel": "triton", "chunk_rows": 2, "exchange": "ring"}
            found[layout, name, dtype] = call(name, dtype, settings, LAYOUTS[layout], rank)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, path = sys.argv[1:]
    if what == "tiles":
        results = of_tiles()
    else:
        results = [[of_losses(0, 1)]]
        results += [run_ranks(of_losses, size, start_method="fork") for size in (2, 3)]
    torch.save(results, path)
