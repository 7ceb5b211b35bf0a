"""Export of a trained model to open_clip, transformers, sentence-transformers or ONNX.

Every form is a function that writes into a folder and one that reads it back with the library it is
meant for. A folder appears whole, under its final name, after its features were found equal to
ours. An earlier folder is replaced only on request, and only if it is an export itself.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.interop.comparison import Reader, compare
from dist_siglip.models.interop.publish import Card, Form, write_card
from dist_siglip.models.interop.to_onnx import (
    GraphPrecision,
    TokenType,
    lower_precision,
    read_onnx,
    write_onnx,
)
from dist_siglip.models.interop.to_open_clip import (
    name_text_tower,
    read_open_clip,
    read_safetensors,
    write_open_clip,
    write_safetensors,
)
from dist_siglip.models.interop.to_transformers import (
    read_hugging_face,
    read_sentence_transformers,
    write_hugging_face,
    write_sentence_transformers,
)
from dist_siglip.models.weights_file import refuse_not_finite

# The file by which an export is known.
MARK = "export.json"


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Hand out a new folder that gets its final name when the block ends without an error.

    Raises:
        UserError: If ``folder`` is a file, cannot be made, or holds files and may not be replaced.
    """
    _refuse_to_replace(folder, overwrite)
    beside = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out ({folder}) cannot be made: {error.strerror or error}") from error
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            _sync(path)
        _rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(folder.parent)


def _refuse_to_replace(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"out ({folder}) is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        raise UserError(f"out ({folder}) holds files of others (no {MARK}); name another folder")
    if not overwrite:
        raise UserError(f"out ({folder}) holds an export; name another folder, or add --overwrite")


def _rename(beside: Path, folder: Path) -> None:
    """Rename, with an earlier export out of the way and back again if that fails."""
    if not folder.exists():
        beside.rename(folder)
        return
    former = folder.with_name(f".{folder.name}.{uuid4().hex}.old")
    folder.rename(former)
    try:
        beside.rename(folder)
    except BaseException:
        former.rename(folder)
        raise
    shutil.rmtree(former)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Of an entry of a feature of length 1, in fp32.
LARGEST_DIFFERENCE = 1e-5
# Of a feature in fp16 and the same in fp32; below, something has overflowed.
_LOWEST_COSINE = 0.99

_FORMS: dict[Form, tuple[Callable[..., None], Callable[[BuiltModel, Path], Reader]]] = {
    "open_clip": (write_open_clip, read_open_clip),
    "hf": (write_hugging_face, read_hugging_face),
    "sentence-transformers": (write_sentence_transformers, read_sentence_transformers),
    "safetensors": (write_safetensors, read_safetensors),
    "onnx": (write_onnx, read_onnx),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        folder: where it is.
        largest_difference: between an entry of our features and of those read back, in fp32.
        lowered: what a lower precision has changed: ``lowest_cosine``, and what ``measure`` found.
    """

    folder: Path
    largest_difference: float
    lowered: Mapping[str, Any] = field(default_factory=dict)


def check_graph_options(to: Form, precision: GraphPrecision, token_type: TokenType) -> None:
    """Check that what is of graphs alone is asked of them alone.

    Raises:
        UserError: If it is asked of another form.
    """
    for name, value, usual in (
        ("precision", precision, "fp32"),
        ("token_type", token_type, "int64"),
    ):
        if to != "onnx" and value != usual:
            raise UserError(f"{name} ({value}) is of onnx, not of {to}; leave it out, or --to onnx")


def export_model(
    built: BuiltModel,
    folder: Path,
    *,
    to: Form,
    overwrite: bool = False,
    precision: GraphPrecision = "fp32",
    token_type: TokenType = "int64",
    measure: Callable[[Reader], Mapping[str, Any]] | None = None,
    card: Card | None = None,
) -> Exported:
    """Write a model into a folder for another library, and read it back before it is shown.

    Args:
        built: with the trained scale and the trained absolute bias as its start values.
        folder: made; it is there only if everything went well.
        to: which library's form.
        overwrite: replace an earlier export in ``folder``.
        precision: of the graphs of ONNX. They are compared in fp32, then lowered.
        token_type: of the token ids that the text graph of ONNX takes.
        measure: called with the lowered graphs; what it returns goes to export.json and the card.
        card: what the model card says beside the model itself.

    Raises:
        UserError: If a weight is not finite, the form cannot express the model, a package is
            missing, ``folder`` is in use or cannot be written, the features read back differ by
            more than 1e-5, or those in fp16 have another direction.
    """
    card = card or Card()
    refuse_not_finite(built.encoder.clip.state_dict(), "the model")
    check_graph_options(to, precision, token_type)
    write, read = _FORMS[to]
    if to == "onnx":
        write = partial(write_onnx, token_type=token_type)
    with whole_folder(folder, overwrite=overwrite) as beside:
        try:
            write(built, beside)
        except (OSError, SafetensorError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"out ({folder}) cannot be written: {text}") from error
        difference = compare(built, read(built, beside)).largest
        # Not-a-number fails, too.
        if not difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"to ({to}) gives features that differ by {difference:.1e}, more than "
                f"{LARGEST_DIFFERENCE:g}, so nothing was written; use safetensors"
            )
        lowered = _lower(built, beside, precision, measure) if precision != "fp32" else {}
        if to in ("open_clip", "safetensors"):
            name_text_tower(beside, card.repository or str(folder.absolute()))
        said = {
            "to": to,
            "logit_scale": built.start_scale,
            "logit_bias": built.start_bias,
            "largest_difference": difference,
            **({"precision": precision, "token_type": token_type} if to == "onnx" else {}),
            **({"lowered": lowered} if lowered else {}),
            "matryoshka_dims": list(built.prefix_dims),
            **({} if built.patches is None else built.patches._asdict()),
            **built.pictures.of_model,
        }
        text = write_card(built, card, to, said)
        (beside / "README.md").write_text(text, encoding="utf-8")
        (beside / MARK).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return Exported(folder=folder, largest_difference=difference, lowered=lowered)


def _lower(
    built: BuiltModel,
    folder: Path,
    precision: GraphPrecision,
    measure: Callable[[Reader], Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Lower the precision of the graphs in a folder, and say what that has changed."""
    lower_precision(folder, "fp16" if precision == "fp16" else "int8")
    reader = read_onnx(built, folder)
    cosine = compare(built, reader).lowest_cosine
    if not cosine > (_LOWEST_COSINE if precision == "fp16" else -1.0):
        raise UserError(
            f"precision ({precision}) turns a feature (cosine {cosine:.3f} with that in fp32), so "
            "nothing was written; use fp32"
        )
    return {"lowest_cosine": cosine, **({} if measure is None else measure(reader))}


__all__ = ["Exported", "Form", "check_graph_options", "export_model"]
