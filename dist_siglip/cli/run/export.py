"""``export``: a trained model as other libraries read it, its card, and its way to the hub."""

import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dist_siglip.cli.parser import CommandParser, call, introduction_of
from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.encoding import choose_device
from dist_siglip.evaluation.retrieval import PairMetrics
from dist_siglip.evaluation.shards import LoadSettings
from dist_siglip.models import BuiltModel
from dist_siglip.models.interop.comparison import Reader
from dist_siglip.models.interop.export import Exported, check_graph_options, export_model
from dist_siglip.models.interop.publish import Card, Form, check_push, push_folder, write_card
from dist_siglip.models.interop.to_onnx import GraphPrecision, TokenType
from dist_siglip.report.model_card import card_of_run, public
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.training.module.trained import load_trained, read_config

logger = logging.getLogger(__name__)

_COMPARED = tuple(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``export`` and run it."""
    return call(export, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``export``."""
    made = CommandParser(prog=f"dist-siglip {command}", description=introduction_of(export))
    made.add_function_arguments(export, as_group=False, skip={"overwrite", "private"})
    # Flags, not values.
    made.add_argument(
        "--overwrite", action="store_true", help="Replace an earlier export in this folder."
    )
    made.add_argument(
        "--private", action="store_true", help="Make the repository of --push private."
    )
    return made


def export(
    *,
    to: Form | None = None,
    out: str | None = None,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    weights_average: bool | None = None,
    num_patches: int | None = None,
    precision: GraphPrecision = "fp32",
    token_type: TokenType = "int64",
    val_shards: str | list[str] | None = None,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    card: str | None = None,
    license: str = "other",  # noqa: A002 - the name of the option
    push: str | None = None,
    revision: str | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a model for another library, read it back with it, and compare the features.

    Args:
        to: open_clip for open_clip.create_model_from_pretrained("local-dir:FOLDER"); hf for
            transformers.AutoModel and AutoProcessor; sentence-transformers for
            SentenceTransformer; onnx for onnxruntime, a graph for each tower; safetensors for this
            package, whatever the image tower.
        out: folder to write; it appears only when it is complete and its features are ours. Null
            with push: nothing is left on this machine.
        run_dir: folder of a run, whose newest checkpoint is exported.
        ckpt_path: another checkpoint of that run.
        model: in place of a run, as model.model of a configuration names it.
        pretrained: weights of model, as model.pretrained names them.
        weights_average: true takes the average that a checkpoint holds, false the weights it was
            made of; null the average of a run, of other weights what they put first.
        num_patches: most patches of a picture that the export says, for towers of pictures of any
            shape (NaFlex). Null is as the run or the model says.
        precision: of the graphs of onnx. fp16 and int8 are compared with fp32: by a few random
            inputs, and by the recall of val_shards.
        token_type: of the token ids that the text graph of onnx takes.
        val_shards: pairs to compare recall on, where precision is lowered. Null: those of the run.
        captions: where their captions are; of the run's own it is known.
        card: write the model card into this file and export nothing.
        license: identifier of the hub, such as apache-2.0, for the card; other states none.
        push: ORG/NAME on the Hugging Face hub to push the export to, in one commit, with the token
            of hf auth login or HF_TOKEN.
        revision: branch to push to; null is main.
        private: make the repository of push private.
        overwrite: replace an earlier export in this folder.
    """
    if card is not None:
        others = {
            "to": to,
            "out": out,
            "push": push,
            "revision": revision,
            "val_shards": val_shards,
            "precision": precision != "fp32",
            "token_type": token_type != "int64",
            "private": private,
            "overwrite": overwrite,
        }
        _check_card_alone(card, [name for name, value in others.items() if value])
    else:
        _check(to, out, push, revision, private=private)
    if to is not None:
        check_graph_options(to, precision, token_type)
    if val_shards is not None and precision == "fp32":
        raise UserError("val_shards is compared on where precision is fp16 or int8; leave it out")
    if val_shards is None and captions != CaptionRule():
        raise UserError("captions are of val_shards; those of the run are known, leave them out")
    described = Card(licence=license, repository=push)
    if model is not None:
        described = replace(described, name=public(model))
    if push is not None:
        check_push(push, license)
    built = load_trained(
        run_dir=run_dir,
        ckpt_path=ckpt_path,
        model=model,
        pretrained=pretrained,
        weights_average=weights_average,
        num_patches=num_patches,
    )
    if run_dir is not None:
        try:
            is_unknown = ckpt_path is not None and built.trained_steps is None
            described = card_of_run(
                Path(run_dir),
                licence=license,
                step=-1 if is_unknown else built.trained_steps,
                weights_average=weights_average,
            )
            described = replace(described, repository=push)
        except UserError as error:
            logger.warning("the card says nothing of the run (%s)", error)
            described = replace(described, name=public(Path(run_dir).resolve().name))
    if card is not None:
        _write(Path(card), write_card(built, described, None, {}))
        return 0
    measure = None
    if precision != "fp32":
        measure = _measure(built, val_shards, captions, run_dir)
    with tempfile.TemporaryDirectory(prefix="dist_siglip-export-") as scratch:
        folder = Path(out) if out is not None else Path(scratch) / "export"
        done = export_model(
            built,
            folder,
            to=to or "safetensors",
            overwrite=overwrite,
            precision=precision,
            token_type=token_type,
            measure=measure,
            card=described,
        )
        _tell(built, done, precision, out)
        if push is not None:
            address = push_folder(folder, push, private=private, revision=revision)
            sys.stdout.write(f"pushed to {address}\n")
    return 0


def _check_card_alone(card: str, others: list[str]) -> None:
    """Refuse what is of an export where the card alone is written."""
    if others:
        raise UserError(
            f"card ({card}) is written alone; leave out {', '.join(others)}: an export has its "
            "card as README.md"
        )


def _check(
    to: Form | None,
    out: str | None,
    push: str | None,
    revision: str | None,
    *,
    private: bool,
) -> None:
    """Refuse options that contradict each other."""
    if to is None:
        raise UserError(
            "to (null) must be open_clip, hf, sentence-transformers, onnx or safetensors; or give "
            "card for the card alone"
        )
    if out is None and push is None:
        raise UserError("out (null) must name a folder to write, or push a repository")
    if push is None and (revision is not None or private):
        raise UserError("revision and private are of push; give push ORG/NAME")


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(
            f"card ({path}) cannot be written ({error.strerror or error}); name another file"
        ) from error
    sys.stdout.write(f"wrote {path}\n")


def _tell(built: BuiltModel, done: Exported, precision: GraphPrecision, out: str | None) -> None:
    made = "made an export" if out is None else f"wrote {done.folder}"
    sys.stdout.write(
        f"{made}: scale {built.start_scale:.4g}, bias {built.start_bias:.4g}; "
        f"read back, features differ by {done.largest_difference:.1e} at most\n"
    )
    if done.lowered:
        told = [f"cosine with fp32 at least {done.lowered['lowest_cosine']:.4f}"]
        told += [
            f"{name} {before:.4f} -> {after:.4f}"
            for name, (before, after) in done.lowered.get("metrics", {}).items()
        ]
        sys.stdout.write(f"{precision}: {', '.join(told)}\n")


def _measure(
    built: BuiltModel,
    shards: str | list[str] | None,
    captions: CaptionRule,
    run_dir: str | None,
) -> Callable[[Reader], dict[str, Any]] | None:
    """Return what compares the recall of lowered graphs with ours; None without pairs."""
    loading = LoadSettings(local_batch_size=64, workers_per_rank=0)
    is_own = shards is None
    if is_own and run_dir is not None:
        shards, captions = _pairs_of_run(Path(run_dir))
    if shards is None:
        logger.warning("recall is not compared: give val_shards")
        return None
    task = PairMetrics(shards, name="val_shards", captions=captions, loading=loading)
    try:
        task.check()
    except UserError as error:
        if not is_own:
            raise
        logger.warning("recall is not compared (%s); give val_shards", error)
        return None
    inputs = Preprocessing.of(built)
    ours = EvaluatedModel.of(
        built.encoder,
        inputs,
        logit_scale=built.start_scale,
        logit_bias=built.start_bias,
        device=choose_device("cpu", 0),
    )
    normalizer = ImageNormalizer(inputs.mean, inputs.std)

    def measure(reader: Reader) -> dict[str, Any]:
        if reader.encode_tokens is None:
            raise TypeError("this form takes no tokens")
        before = task.evaluate(ours).metrics
        theirs = ours._replace(
            encode_image=lambda pixels: reader.encode_image(normalizer.pixels(pixels)),
            encode_text=reader.encode_tokens,
        )
        after = task.evaluate(theirs).metrics
        return {
            "pairs": f"{before['gallery_pairs']:.0f} pairs of {public(shards)}",
            "metrics": {name: [before[name], after[name]] for name in _COMPARED if name in before},
        }

    return measure


def _pairs_of_run(run_dir: Path) -> tuple[str | list[str] | None, CaptionRule]:
    """Validation pairs of a run, and where their captions are."""
    data = read_config(RunFolder(run_dir)).get("data") or {}
    said = data.get("captions") or {}
    known = {each.name: said[each.name] for each in fields(CaptionRule) if each.name in said}
    if "members" in known:
        known["members"] = tuple(known["members"])
    return data.get("val_shards"), CaptionRule(**known)
