"""Export of a trained model to open_clip, transformers, safetensors or ONNX.

Every form is a function that writes into a folder and one that reads it back with the library it is
meant for. A folder appears whole, under its final name, after its features were found equal to
ours. An earlier folder is replaced only on request, and only if it is an export itself.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from safetensors import SafetensorError

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.interop.comparison import largest_difference
from dist_siglip.models.interop.to_onnx import read_onnx, write_onnx
from dist_siglip.models.interop.to_open_clip import (
    name_text_tower,
    read_open_clip,
    read_safetensors,
    write_open_clip,
    write_safetensors,
)
from dist_siglip.models.interop.to_transformers import read_hugging_face, write_hugging_face
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
        for path in (*beside.iterdir(), beside):
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


Form = Literal["open_clip", "hf", "safetensors", "onnx"]

# Of an entry of a feature of length 1, in fp32.
LARGEST_DIFFERENCE = 1e-5

_FORMS = {
    "open_clip": (write_open_clip, read_open_clip),
    "hf": (write_hugging_face, read_hugging_face),
    "safetensors": (write_safetensors, read_safetensors),
    "onnx": (write_onnx, read_onnx),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        folder: where it is.
        largest_difference: between an entry of our features and of those read back.
    """

    folder: Path
    largest_difference: float


def export_model(built: BuiltModel, folder: Path, *, to: Form, overwrite: bool = False) -> Exported:
    """Write a model into a folder for another library, and read it back before it is shown.

    Args:
        built: with the trained scale and the trained absolute bias as its start values.
        folder: made; it is there only if everything went well.
        to: which library's form.
        overwrite: replace an earlier export in ``folder``.

    Raises:
        UserError: If a weight is not finite, the form cannot express the model, a package is
            missing, ``folder`` is in use or cannot be written, or the features read back differ by
            more than 1e-5.
    """
    refuse_not_finite(built.encoder.clip.state_dict(), "the model")
    write, read = _FORMS[to]
    with whole_folder(folder, overwrite=overwrite) as beside:
        try:
            write(built, beside)
        except (OSError, SafetensorError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"out ({folder}) cannot be written: {text}") from error
        difference = largest_difference(built, read(built, beside))
        # Not-a-number fails, too.
        if not difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"to ({to}) gives features that differ by {difference:.1e}, more than "
                f"{LARGEST_DIFFERENCE:g}, so nothing was written; use safetensors"
            )
        if to in ("open_clip", "safetensors"):
            name_text_tower(beside, folder)
        said = {
            "to": to,
            "logit_scale": built.start_scale,
            "logit_bias": built.start_bias,
            "largest_difference": difference,
            "matryoshka_dims": list(built.prefix_dims),
            **({} if built.patches is None else built.patches._asdict()),
            **built.pictures.of_model,
        }
        (beside / "README.md").write_text(_card(built, to), encoding="utf-8")
        (beside / MARK).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return Exported(folder=folder, largest_difference=difference)


def _card(built: BuiltModel, to: Form) -> str:
    """Model card: what the features are made of, and how many of their dimensions may be used."""
    lines = [
        "---",
        "library_name: dist_siglip",
        "pipeline_tag: zero-shot-image-classification",
        "---",
        "",
        f"Image and text features of {built.embed_dim} dimensions, divided by their length; the "
        f"logit of a pair is {built.start_scale:.6g} * cosine + ({built.start_bias:.6g}).",
    ]
    if built.patches is not None:
        lines.append(
            f"Pictures keep their shape (NaFlex): resized bilinearly to at most "
            f"{built.patches.num_patches} patches of {built.patches.patch_size} pixels; other "
            "numbers can be asked for."
        )
        if to == "hf":
            lines.append(
                "Texts are read by `PreTrainedTokenizerFast.from_pretrained` of this folder: of a "
                "`Siglip2Model` `AutoTokenizer` of transformers 5 makes a tokenizer of its own."
            )
    if built.prefix_dims:
        dims = ", ".join(map(str, built.prefix_dims))
        lines.append(
            f"Trained at prefixes (Matryoshka): the first {dims} dimensions can be used alone. Cut "
            "features, then divide them by their length again."
        )
    return "\n".join(lines) + "\n"


__all__ = ["Exported", "Form", "export_model"]
