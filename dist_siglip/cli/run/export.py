"""``export``: a trained model as other libraries read it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import CommandParser, introduction_of
from dist_siglip.models.interop.export import Form, export_model
from dist_siglip.training.module.trained import load_trained


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``export`` and run it."""
    set_up_logging()
    return export(**parser(command).parse_args(list(arguments)).as_dict())


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``export``."""
    made = CommandParser(prog=f"dist-siglip {command}", description=introduction_of(export))
    made.add_function_arguments(export, as_group=False, skip={"overwrite"})
    # A flag, not a value.
    made.add_argument(
        "--overwrite", action="store_true", help="Replace an earlier export in this folder."
    )
    return made


def export(
    *,
    to: Form,
    out: str,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    weights_average: bool | None = None,
    num_patches: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write a model for another library, read it back with it, and compare the features.

    Args:
        to: open_clip for open_clip.create_model_from_pretrained("local-dir:FOLDER"); hf for
            transformers.AutoModel and AutoProcessor; onnx for onnxruntime, a graph for each tower;
            safetensors for this package, whatever the image tower.
        out: folder to write; it appears only when it is complete and its features are ours.
        run_dir: folder of a run, whose newest checkpoint is exported.
        ckpt_path: another checkpoint of that run.
        model: in place of a run, as model.model of a configuration names it.
        pretrained: weights of model, as model.pretrained names them.
        weights_average: true takes the average that a checkpoint holds, false the weights it was
            made of; null the average of a run, of other weights what they put first.
        num_patches: most patches of a picture that the export says, for towers of pictures of any
            shape (NaFlex). Null is as the run or the model says.
        overwrite: replace an earlier export in this folder.
    """
    built = load_trained(
        run_dir=run_dir,
        ckpt_path=ckpt_path,
        model=model,
        pretrained=pretrained,
        weights_average=weights_average,
        num_patches=num_patches,
    )
    done = export_model(built, Path(out), to=to, overwrite=overwrite)
    sys.stdout.write(
        f"wrote {done.folder}: scale {built.start_scale:.4g}, bias {built.start_bias:.4g}; "
        f"read back, features differ by {done.largest_difference:.1e} at most\n"
    )
    return 0
