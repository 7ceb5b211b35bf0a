"""Digits, variants, whole losses, cubins and launches of the Triton kernels; what comes instead.

Triton's interpreter runs them on a CPU, in a process of its own: it is chosen when Triton is
imported. Its compiler makes cubins without a GPU.
"""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.distributed import prepare_exchange
from dist_siglip.errors import UserError
from dist_siglip.losses import SigLipLoss, siglip_loss, softmax_loss, uniformity_loss
from dist_siglip.losses.kernels import pair_terms
from dist_siglip.losses.kernels.pair_terms import choose_kernel, compiled
from dist_siglip.losses.kernels.tiles import SigmoidTiles
from dist_siglip.losses.ring_pass import RingPass
from tests.losses.kernels import interpreted
from tests.losses.kernels.interpreted import BIAS, LOGITS, SCALE
from tests.support import reference_matryoshka
from tests.support.parity import LAYOUTS, largest_error, make_rows
from tests.support.reference import sigmoid, sigmoid_loss_and_gradients, softplus
from tests.support.reference_pairwise import (
    cross_uniformity_and_gradients,
    mined_sigmoid_and_gradients,
    softmax_loss_and_gradients,
    uniformity_and_gradients,
)
from tests.support.reference_relevance import relevance_sigmoid_and_gradients

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

TINY = torch.finfo(torch.float32).tiny
# Rounding of what is stored; the interpreter cuts off where a GPU rounds.
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2.0**-7}


def run_interpreted(what, path):
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.losses.kernels.interpreted", what, str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return run_interpreted("tiles", tmp_path_factory.mktemp("interpreted") / "tiles.pt")


def terms_of(products, rows, columns, kinds, duplicates, diagonal, relevant):
    """Value, sums by bias and scale, duplicates and derivative: a loop over pairs in float64."""
    value = by_bias = by_scale = equal_pairs = 0.0
    derivative = torch.zeros(products.shape, dtype=torch.float64)
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            matches = diagonal is not None and i + diagonal == j
            equal = kinds > 0 and not matches and bool((rows[i] == columns[j]).any())
            equal_pairs += equal
            if equal and duplicates == "masked":
                continue
            positive = matches or (equal and duplicates == "positive") or bool(relevant[i, j])
            product = float(products[i, j])
            z = SCALE * product + BIAS
            value += softplus(-z if positive else z)
            d = -sigmoid(-z) if positive else sigmoid(z)
            derivative[i, j], by_bias, by_scale = d, by_bias + d, by_scale + d * product
    return torch.tensor([value, by_bias, by_scale, equal_pairs], dtype=torch.float64), derivative


@pytest.mark.parametrize("case", list(interpreted.sigmoid_cases()), ids=str)
def test_every_variant_is_the_loop_over_pairs(tiles, case):
    shape, kinds, duplicates, diagonal, with_relevance, dtype = case
    products, rows, columns, relevant = interpreted.sigmoid_inputs(shape, kinds)
    relevant = relevant if with_relevance else torch.zeros(shape, dtype=torch.bool)
    truth, derivative = terms_of(products, rows, columns, kinds, duplicates, diagonal, relevant)
    sums, found = tiles["sigmoid", case]
    assert sums[3] == truth[3]
    # Logits are rounded to float32 here, and terms of both signs cancel in the sums.
    size = derivative.abs().sum() + 1e-12
    assert abs(sums[0] - truth[0]) <= 1e-6 * truth[0]
    assert (abs(sums[1:3] - truth[1:3]) <= 2e-6 * size).all()
    error = (found.double() - derivative).abs()
    # Rounding of the logit, and of what is stored.
    assert (error <= (2e-6 + ROUNDING[dtype]) * derivative.abs()).all()


@pytest.mark.parametrize("logit", LOGITS)
def test_a_value_has_its_digits_from_tiny_to_saturated_logits(tiles, logit):
    """Within 2e-7 of float64; below the smallest float32 it is 0."""
    logit = torch.tensor(float(logit)).double().item()  # as float32 has it
    value, derivative = tiles["logit", next(x for x in LOGITS if torch.tensor(float(x)) == logit)]
    assert value.item() == pytest.approx(softplus(logit), rel=2e-7, abs=TINY)
    assert derivative.item() == pytest.approx(sigmoid(logit), rel=2e-7, abs=TINY)


def test_nan_is_passed_on(tiles):
    assert tiles["nan"].isnan()


@pytest.mark.parametrize("diagonal", [None, 0, 1])
@pytest.mark.parametrize("shape", [(3, 2), (40, 150)])
def test_softmax_and_gaussian_tiles_are_those_of_torch(tiles, shape, diagonal):
    passes = tiles["others", (*shape, diagonal)]
    for found, expected in zip(passes["triton"], passes["eager"], strict=True):
        assert found.shape == expected.shape
        assert torch.equal(found.isinf(), expected.isinf())
        finite = ~expected.isinf()
        torch.testing.assert_close(
            found[finite].double(), expected[finite].double(), rtol=2e-6, atol=2e-6
        )


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    by_size = run_interpreted("losses", tmp_path_factory.mktemp("interpreted") / "losses.pt")
    return {key: result for ranks in by_size for key, result in ranks[-1].items()}


def reference_of(name, num_rows):
    images, texts = make_rows(("image", "text"), num_rows).values()
    if name.endswith("at prefixes"):
        return reference_matryoshka.reference_of(name.split()[0], num_rows)
    if name == "softmax":
        return softmax_loss_and_gradients(images, texts, SCALE)
    if name == "uniformity":
        return uniformity_and_gradients(images)
    if name == "cross_uniformity":
        return cross_uniformity_and_gradients(images, texts)
    if name == "relevance":
        relevance = interpreted.relevance_of(num_rows)
        found = relevance_sigmoid_and_gradients(images, texts, relevance, SCALE, BIAS)
        return {"image": found["queries"], "text": found["documents"], **found}
    ids = interpreted.ids_of(num_rows) if name in ("duplicates", "mined") else None
    if name == "mined":
        return mined_sigmoid_and_gradients(
            images, texts, SCALE, BIAS, 2, 3.0, ids.tolist(), "positive"
        )
    return sigmoid_loss_and_gradients(images, texts, SCALE, BIAS, ids, "positive")


@pytest.mark.e2e
@pytest.mark.parametrize("name", interpreted.NAMES)
@pytest.mark.parametrize("layout", ["one", "even-2", "uneven-2", "even-3", "uneven-3"])
def test_a_loss_with_the_kernels_is_that_of_one_process(losses, layout, name):
    truth = reference_of(name, sum(LAYOUTS[layout]))
    # As in test_parity.
    tolerances = {torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}
    results = {key[2]: result for key, result in losses.items() if key[:2] == (layout, name)}
    assert torch.float32 in results
    for dtype, result in results.items():
        assert all(value is not None for value in result.values())
        assert largest_error(result, truth) < tolerances[dtype]


# A thread block of 128 threads with 64 registers each fills half of a multiprocessor's threads.
REGISTERS = {"plain": 80, "whole": 128, "softmax_sums": 128, "softmax_derivative": 80}
REGISTERS |= {"gaussian": 96, "add_log_sums": 40}
POINTERS = {"similarity": "*fp32", "derivative": "*bf16", "kernel": "*bf16", "sums": "*fp64"}
POINTERS |= {"row_ids": "*i64", "column_ids": "*i64", "relevant": "*i1"}
SIZES = ("rows", "columns", "relevant_stride", "diagonal", "num_parts", "size")
VARIANTS = {
    "plain": ("sigmoid_terms", {"HAS_DIAGONAL": False, "ID_KINDS": 0, "HAS_RELEVANT": False}),
    "whole": ("sigmoid_terms", {"HAS_DIAGONAL": True, "ID_KINDS": 2, "HAS_RELEVANT": True}),
    "softmax_sums": ("softmax_sums", {"HAS_DIAGONAL": True}),
    "softmax_derivative": ("softmax_derivative", {"HAS_DIAGONAL": True, "WITH_SCALE": True}),
    "gaussian": ("gaussian", {"HAS_DIAGONAL": True}),
    "add_log_sums": ("add_log_sums", {}),
}


def cubin_of(variant, capability):
    """Translate a kernel for a GPU that is not here."""
    from triton import compile as translate
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_siglip.losses.kernels import triton_kernels, triton_terms

    name, constants = VARIANTS[variant]
    kernel = getattr(triton_kernels, name)
    block = triton_terms.SUMS_BLOCK if variant in ("softmax_sums", "gaussian") else None
    block = dict(
        zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), block or triton_terms.TERMS_BLOCK, strict=True)
    )
    every = {"WITH_DERIVATIVE": True, "DUPLICATES": 1, "BLOCK": triton_terms.VECTOR_BLOCK}
    constants = {n: v for n, v in (every | block | constants).items() if n in kernel.arg_names}
    kinds = {n: "i32" if n in SIZES else POINTERS.get(n, "*fp32") for n in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    # What Triton finds out at a launch: pointers and row lengths that are multiples of 16.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and n not in ("rows", "relevant_stride", "diagonal", "num_parts")
    }
    source = ASTSource(kernel, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": triton_terms.NUM_WARPS}
    return translate(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources_of(cubin, path):
    """Registers of a thread and bytes that it spills, as NVIDIA's own tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    path.write_bytes(cubin)
    done = subprocess.run(
        [tool, "-res-usage", path], capture_output=True, text=True, check=True, timeout=60
    )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize(
    "capability",
    [80, pytest.param(90, marks=pytest.mark.e2e), pytest.param(100, marks=pytest.mark.e2e)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cubins_fit_the_registers_and_divide_no_64_bit_number(variant, capability, tmp_path):
    compiled_kernel = cubin_of(variant, capability)
    registers, spilled = resources_of(compiled_kernel.asm["cubin"], tmp_path / "kernel.cubin")
    assert registers <= REGISTERS[variant]
    assert spilled == 0
    ptx = compiled_kernel.asm["ptx"]
    assert not re.findall(r"\b(?:div|rem)\.[su]64", ptx)
    if variant == "plain":  # one read of the tile and one write, both of whole vectors
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert re.search(r"st\.global\S*\.v4\.b32", ptx)


class Launches(TorchDispatchMode):
    """Names of the operations that start work on a GPU; views and new memory start none."""

    NONE = ("empty", "view", "slice", "t.", "transpose", "detach", "alias", "permute", "prim")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.NONE):
            self.names.append(name.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_launches_four_kernels(dtype, monkeypatch):
    """Similarity, terms, and two products, of which the first of a gradient overwrites it."""
    names = []
    kernels = "dist_siglip.losses.kernels"
    monkeypatch.setattr(f"{kernels}.pair_terms._triton_obstacle", lambda *_: "")
    monkeypatch.setattr(f"{kernels}.triton_terms.launch", lambda *_, **__: names.append("terms"))
    monkeypatch.setattr(f"{kernels}.tiles._adds_half_products", lambda *_: True)

    class Pass(RingPass):
        def tile(self, place, home, shard, added):
            return tiles.derivative(home, shard[0], diagonal=place.diagonal)

    with FakeTensorMode():
        features = torch.empty(8, 16, device="cuda", dtype=dtype)
        scalar = torch.empty((), device="cuda")
        plan = prepare_exchange([features])
        tiles = SigmoidTiles(features, (4, 4), scalar, scalar, kernel="triton")
        ring_pass = Pass(features, plan, (4, 4), with_home_gradient=True)
        contribution = torch.empty(8, 16, device="cuda")
        with Launches() as launches:
            launches.names = names
            ring_pass.visit(0, (features,), (contribution,))
    first, second = "mm", "addmm_" if dtype == torch.float32 else "addmm"
    of_tile = [
        # by column: home gradient, gradient that travels
        ["mm", "terms", first, first],
        ["mm", "terms", first, second],
        ["mm", "terms", second, first],
        ["mm", "terms", second, second],
    ]
    assert names == [name for tile in of_tile for name in tile]


def test_what_is_chosen_and_said_where_triton_cannot_be_had(monkeypatch, caplog):
    features = torch.ones(1)
    assert choose_kernel("auto", features) == "eager"
    assert choose_kernel("compiled", features) == "compiled"
    with pytest.raises(UserError, match=r"kernel \('triton'\) cannot be used: the features are on"):
        choose_kernel("triton", features)
    with pytest.raises(UserError, match=r"kernel \('cuda'\) must be one of auto, triton"):
        choose_kernel("cuda", features)
    with pytest.raises(UserError, match=r"kernel \('cuda'\) must be one of auto, triton"):
        SigLipLoss(kernel="cuda")
    pair_terms._log_once.cache_clear()
    pair_terms._triton_obstacle.cache_clear()
    with FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
    try:
        with caplog.at_level(logging.WARNING):
            monkeypatch.setattr(
                "dist_siglip.losses.kernels.triton_terms.try_kernels",
                lambda *_: (_ for _ in ()).throw(RuntimeError("ptxas: out of registers")),
            )
            assert [choose_kernel("auto", on_gpu) for _ in range(3)] == ["compiled"] * 3
            pair_terms._triton_obstacle.cache_clear()
            monkeypatch.setattr(pair_terms, "find_spec", lambda _: None)
            assert choose_kernel("auto", on_gpu) == "compiled"
    finally:
        pair_terms._triton_obstacle.cache_clear()
    assert [record.message for record in caplog.records] == [
        "kernel auto -> compiled: its kernels do not build (RuntimeError: ptxas: out of registers)",
        "kernel auto -> compiled: triton is not installed",
    ]


def test_compiled_terms_fall_back_to_eager_ones_with_one_line(monkeypatch, caplog):
    def fails(function, **options):
        from torch._dynamo.exc import TorchDynamoException

        def call(*_):
            raise TorchDynamoException("no compiler")

        return call

    pair_terms._log_once.cache_clear()
    monkeypatch.setattr(torch, "compile", fails)
    call = compiled(lambda x: x + 1)
    with caplog.at_level(logging.WARNING):
        assert [call(1), call(2)] == [2, 3]
    assert len(caplog.records) == 1
    assert "torch.compile fails" in caplog.text


@pytest.mark.e2e
def test_compiled_losses_are_eager_ones():
    """As for a GPU without Triton; by the C++ compiler of this machine."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.nn.functional.normalize(torch.randn(2, 20, 8, generator=generator), dim=-1)
    results = {}
    for kernel in ("compiled", "eager"):
        images, texts = (side.clone().requires_grad_() for side in sides)
        scale, bias = (torch.tensor(x, requires_grad=True) for x in (SCALE, BIAS))
        settings = {"kernel": kernel, "chunk_rows": 12}
        loss = siglip_loss(images, texts, scale, bias, **settings)
        loss = loss + softmax_loss(images, texts, scale, **settings)
        loss = loss + uniformity_loss(images, **settings)
        loss.backward()
        results[kernel] = [loss.detach(), images.grad, texts.grad, scale.grad, bias.grad]
    for found, expected in zip(results["compiled"], results["eager"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


CASES = [
    (loss, dtype, kernel)
    for loss in interpreted.NAMES
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for kernel in ("triton", "compiled", "eager")
    if not (dtype == torch.float64 and kernel == "triton")  # float32 logits only
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "kernel"), CASES)
def test_a_loss_on_a_gpu_is_the_loop_in_float64(name, dtype, kernel):
    num_rows = 37
    rows = make_rows(("image", "text"), num_rows, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = rows | interpreted.scalars_of(name, wide)
    leaves = {key: values[key].cuda().requires_grad_() for key in interpreted.NAMES[name]}
    settings = {"kernel": kernel, "chunk_rows": 16}
    loss = interpreted.loss_of(name, num_rows, slice(0, num_rows), settings, "cuda")(**leaves)
    loss.backward()
    result = {"loss": loss.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}
    truth = reference_of(name, num_rows)
    tolerances = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2}
    on_cpu = {key: value.cpu() for key, value in result.items()}
    assert largest_error(on_cpu, truth) < tolerances.get(dtype, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [-30.0, -16.5, -10.0, -3.0, 2.0, 30.0])
def test_a_large_tile_on_a_gpu_keeps_its_digits(bias):
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = bias + torch.randn(8192, 4096, generator=generator, device="cuda")
    truth = torch.nn.functional.softplus(logits.double(), threshold=40).sum().item()
    from dist_siglip.losses.kernels import triton_terms

    sums = triton_terms.sums_buffer(*logits.shape, triton_terms.TERMS_BLOCK, logits.device)
    one, zero = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    triton_terms.add_sigmoid_terms(logits, None, sums, one, zero, None, None, None, "negative")
    assert sums[:, 0].sum().item() == pytest.approx(truth, rel=2e-7)
