"""The folder that onnxruntime reads: a graph for each tower, and what goes into them.

    image.onnx          pixels (B, 3, H, W) fp32, normalised -> features (B, D) of length 1
    text.onnx           tokens (B, L) int64 or int32 -> features (B, D) of length 1
    tokenizer.json      caption to tokens, padded and cut, for ``tokenizers.Tokenizer.from_file``
    dual_encoder.json   preprocessing, context length, scale and absolute bias

B is free, H, W and L are those of the model. Logits are scale * image @ text.T + bias.

Of a NaFlex tower the first graph takes patches (B, N, 3 p^2) fp32, each its pixels in the order
(row, column, colour), normalised, and shapes (B, 2) int64, rows and columns of patches; N is free.

``lower_precision`` rewrites the graphs; what goes in and comes out stays as it is.
"""

import importlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from dist_siglip.data.samples.patches import is_packed, pack_pictures, unpack
from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.dual_encoder import DualEncoder, evaluation_mode, unit_rows
from dist_siglip.models.interop.comparison import Reader
from dist_siglip.models.interop.tokenizer_files import tokenizer_of, whole_tokenizer

# A file of ONNX holds 2 GiB at most; larger weights lie beside it.
_LARGEST_FILE_BYTES = 2**30
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "tokenizers")
_CONFIG_NAME = "dual_encoder.json"
_GRAPHS = ("image", "text")

GraphPrecision = Literal["fp32", "fp16", "int8"]
TokenType = Literal["int64", "int32"]
# Weights of these become int8: layers, and the table of words.
_INT8 = ["MatMul", "Gemm", "Gather"]
# Stays fp32: the length of a feature, whose squares may add up to more than fp16 holds; and Gelu,
# since onnxruntime 1.32 dies (a segmentation fault) of one in fp16 when it loads a graph on a CPU.
_FLOAT32 = ["ReduceL2", "ReduceSum", "ReduceSumSquare", "Pow", "Sqrt", "LpNormalization", "Gelu"]


class _Image(nn.Module):
    """The image tower alone."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode_image(pixels)


class _Patches(nn.Module):
    """The image tower of pictures of any shape alone."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.visual: Any = encoder.clip.visual

    def forward(self, patches: Tensor, shapes: Tensor) -> Tensor:
        return unit_rows(self.visual.read_patches(patches, shapes)[0])


class _Text(nn.Module):
    """The text tower alone."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder.encode_text(tokens.long())


def write_onnx(built: BuiltModel, folder: Path, *, token_type: TokenType = "int64") -> None:
    """Write both towers as graphs, with tokenizer and preprocessing.

    Args:
        built: the model.
        folder: to write into.
        token_type: of the token ids that the text graph takes.

    Raises:
        UserError: If a package is missing, a tower cannot become a graph, or the tokenizer cannot
            be written into one file.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'to (onnx) needs {", ".join(missing)}; run: pip install "dist-siglip[onnx,hf]"'
        )
    _write_tokenizer(built, folder)
    size = built.image_size
    height, width = (size, size) if isinstance(size, int) else size
    # Two rows: a single one would be taken for a constant.
    pixels = torch.zeros(2, 3, height, width)
    image: tuple[nn.Module, dict[str, Tensor]] = (_Image(built.encoder), {"pixels": pixels})
    if built.patches is not None:
        patches, shapes = unpack(pack_pictures(pixels, built.patches.patch_size))
        image = (_Patches(built.encoder), {"patches": patches, "shapes": shapes})
    tokens = built.tokenizer(["a", "b"]).to(getattr(torch, token_type))
    with evaluation_mode(built.encoder), _quiet():
        _write_graph(*image, folder / "image.onnx")
        _write_graph(_Text(built.encoder), {"tokens": tokens}, folder / "text.onnx")
    config = {
        "embed_dim": built.embed_dim,
        "logit_scale": built.start_scale,
        "logit_bias": built.start_bias,
        "context_length": built.context_length,
        "token_type": token_type,
        "image_size": [height, width],
        "mean": built.mean,
        "std": built.std,
        "interpolation": built.interpolation,
        "resize_mode": built.resize_mode,
        **built.pictures.of_model,
        **({} if built.patches is None else built.patches._asdict()),
    }
    (folder / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lower_precision(folder: Path, precision: Literal["fp16", "int8"]) -> None:
    """Rewrite both graphs with onnxruntime's tools.

    fp16: weights and arithmetic in half precision, but for the length of features. int8: weights of
    matrix products by column, and the table of words, in 8 bits; what they are multiplied with is
    quantised as it comes (dynamic quantisation), so no pictures are needed.
    """
    scratch = folder / "lower"
    scratch.mkdir()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for name in _GRAPHS:
            old, new = folder / f"{name}.onnx", scratch / f"{name}.onnx"
            is_apart = Path(f"{old}.data").exists()
            make = _to_fp16 if precision == "fp16" else _to_int8
            make(old, new, is_apart)
            for path in (old, Path(f"{old}.data")):
                path.unlink(missing_ok=True)
            for suffix in ("", ".data"):
                made = Path(f"{new}{suffix}")
                if made.exists():
                    made.rename(folder / made.name)
    finally:
        logging.disable(disabled)
        shutil.rmtree(scratch)


def _to_fp16(old: Path, new: Path, is_apart: bool) -> None:
    onnx: Any = importlib.import_module("onnx")
    half: Any = importlib.import_module("onnxruntime.transformers.float16")
    blocked = [*half.DEFAULT_OP_BLOCK_LIST, *_FLOAT32]
    # A path, not a graph: above 2 GiB shapes can be inferred in files alone.
    model = half.convert_float_to_float16(str(old), keep_io_types=True, op_block_list=blocked)
    onnx.save(model, new, save_as_external_data=is_apart, location=f"{new.name}.data")


def _to_int8(old: Path, new: Path, is_apart: bool) -> None:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    prepared = new.with_suffix(".prepared.onnx")
    # Folds transposed weights, which would be left as they are.
    quantization.shape_inference.quant_pre_process(
        str(old),
        str(prepared),
        skip_symbolic_shape=True,
        save_as_external_data=is_apart,
        all_tensors_to_one_file=True,
        external_data_location=f"{prepared.name}.data",
    )
    quantization.quantize_dynamic(
        prepared,
        new,
        op_types_to_quantize=_INT8,
        per_channel=True,
        use_external_data_format=is_apart,
    )


def read_onnx(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with onnxruntime and tokenizers alone."""
    from tokenizers import Tokenizer

    runtime: Any = importlib.import_module("onnxruntime")
    image, text = (runtime.InferenceSession(folder / f"{name}.onnx") for name in _GRAPHS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_type = text.get_inputs()[0].type.removeprefix("tensor(").removesuffix(")")

    def encode_tokens(tokens: Tensor) -> Tensor:
        array = tokens.numpy().astype(token_type)
        return torch.from_numpy(text.run(None, {"tokens": array})[0])

    def encode_captions(captions: list[str]) -> Tensor:
        return encode_tokens(torch.tensor([row.ids for row in tokenizer.encode_batch(captions)]))

    def encode_image(images: Tensor) -> Tensor:
        inputs = {"pixels": images}
        if is_packed(images):
            inputs = dict(zip(("patches", "shapes"), unpack(images), strict=True))
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return torch.from_numpy(image.run(None, arrays)[0])

    return Reader(
        encode_image=encode_image,
        encode_captions=encode_captions,
        encode_tokens=encode_tokens,
    )


def _write_tokenizer(built: BuiltModel, folder: Path) -> None:
    made = whole_tokenizer(built)
    inner = tokenizer_of(built).loaded()
    pad: dict[str, Any] = {"pad_id": 0, "pad_token": "!"}
    if isinstance(inner, HFTokenizer):
        theirs = inner.tokenizer
        pad = {"pad_id": theirs.pad_token_id, "pad_token": str(theirs.pad_token)}
        pad["direction"] = theirs.padding_side
    made.enable_truncation(built.context_length)
    made.enable_padding(length=built.context_length, **pad)
    (folder / "tokenizer.json").write_text(made.to_str(pretty=True), encoding="utf-8")


def _write_graph(tower: nn.Module, examples: dict[str, Tensor], path: Path) -> None:
    names = list(examples)
    batch, free = torch.export.Dim("batch"), {"patches": {1: torch.export.Dim("num_patches")}}
    try:
        program: Any = torch.onnx.export(
            tower.eval(),
            tuple(examples.values()),
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=["features"],
            dynamic_shapes=tuple({0: batch, **free.get(name, {})} for name in names),
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"to (onnx): torch cannot turn the tower that takes {' and '.join(names)} into a graph "
            f"({str(error).splitlines()[0][:100]}); use open_clip or safetensors"
        ) from error
    for node in program.model.graph:
        # Where in the source, by paths of this machine, an operation comes from.
        node.metadata_props.clear()
        node.doc_string = None
    num_bytes = sum(value.numel() * value.element_size() for value in tower.state_dict().values())
    program.save(path, external_data=num_bytes > _LARGEST_FILE_BYTES)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of its own optimisations out of the output."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
