"""Publication of an export: its model card, and the push to the Hugging Face hub.

The card is Markdown behind a head in YAML, which the hub reads: licence, library, task, data sets,
and results as a ``model-index``.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from dist_siglip.errors import OutageError, UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.system.redaction import redact

Form = Literal["open_clip", "hf", "sentence-transformers", "safetensors", "onnx"]

UNSTATED = "other"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LIBRARIES = {"hf": "transformers", "safetensors": "dist_siglip"}
_LOADING = {
    "open_clip": """import open_clip

name = "hf-hub:ORG/NAME"  # of a folder: "local-dir:FOLDER"
model, preprocess = open_clip.create_model_from_pretrained(name)
tokenizer = open_clip.get_tokenizer(name)
""",
    "hf": """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("ORG/NAME")
processor = AutoProcessor.from_pretrained("ORG/NAME", backend="pil")
texts = processor(text=["two dogs"], padding="max_length", truncation=True, return_tensors="pt")
""",
    "sentence-transformers": """from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("ORG/NAME")
texts, pictures = model.encode(["two dogs"]), model.encode([Image.open("dogs.jpg")])
similarities = model.similarity(pictures, texts)
""",
    "safetensors": """from dist_siglip import build_dual_encoder

built = build_dual_encoder("hf-hub:ORG/NAME")  # of a folder: "local-dir:FOLDER"
""",
    "onnx": """import numpy
import onnxruntime
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

folder = snapshot_download("ORG/NAME")
image, text = (onnxruntime.InferenceSession(f"{folder}/{n}.onnx") for n in ("image", "text"))
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokens = numpy.array([row.ids for row in tokenizer.encode_batch(["two dogs"])], "TOKEN_TYPE")
(texts,) = text.run(None, {"tokens": tokens})
# What image takes: [(each.name, each.shape) for each in image.get_inputs()].
# Preprocessing, scale and bias: dual_encoder.json.
""",
}
_MOST_LETTERS = 300
_NETWORK = {"httpcore", "httpx", "requests", "urllib"}  # whose errors without an answer are outages


class Result(NamedTuple):
    """Numbers of one data set.

    Attributes:
        task: in the hub's words where it has some, such as "zero-shot-image-classification".
        dataset: name of what was measured on.
        metrics: name to value.
    """

    task: str
    dataset: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says beside the model itself.

    Args:
        name: heading, and name of the model in its results.
        repository: ORG/NAME on the hub, for the lines that load the model.
        licence: identifier of the hub, such as "apache-2.0"; "other" states none.
        datasets: names of data sets on the hub.
        base_model: name on the hub of the model that training began with.
        results: for the ``model-index``.
        sections: Markdown about data, training, results and limits.

    Raises:
        UserError: If the licence is no identifier.
    """

    name: str = "A dual encoder"
    repository: str | None = None
    licence: str = UNSTATED
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    results: tuple[Result, ...] = ()
    sections: str = ""

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.licence):
            raise UserError(
                f"license ({self.licence!r}) must be an identifier of the hub, such as apache-2.0 "
                "or cc-by-4.0, or other"
            )


def write_card(built: BuiltModel, card: Card, to: Form | None, said: Mapping[str, Any]) -> str:
    """Write a model card.

    Args:
        built: the model.
        card: what else to say.
        to: form of the files beside it; None if there are none.
        said: export.json, for what reading the files back has shown.
    """
    parts = [f"# {escaped(card.name)}", "", *_model(built, to)]
    if to is not None:
        loading = _LOADING[to].replace("ORG/NAME", card.repository or "ORG/NAME")
        loading = loading.replace("TOKEN_TYPE", said.get("token_type", "int64"))
        parts += ["", "## Use", "", "```python", loading.rstrip(), "```"]
    if said:
        parts += ["", *_checked(said)]
    if card.sections:
        parts += ["", card.sections.rstrip()]
    parts += ["", "## Licence", "", _licence(card)]
    return "---\n" + _head(card, to) + "---\n\n" + "\n".join(parts) + "\n"


def escaped(text: str) -> str:
    r"""Escape what Markdown would take for HTML, a link, a picture or the end of a cell.

    Example:
        >>> print(escaped("a|b <img src=x>"))
        a\|b \<img src=x>
    """
    return re.sub(r"[\\<\[|]", r"\\\g<0>", text)


def _head(card: Card, to: Form | None) -> str:
    library = _LIBRARIES.get(to or "safetensors", to)
    is_sentence = to == "sentence-transformers"
    head: dict[str, Any] = {
        "license": card.licence,
        "library_name": library,
        "pipeline_tag": "sentence-similarity" if is_sentence else "zero-shot-image-classification",
        "tags": ["dist_siglip", "siglip", "dual-encoder", "image-text-retrieval"],
    }
    if card.base_model:
        head["base_model"] = card.base_model
    if card.datasets:
        head["datasets"] = list(card.datasets)
    if card.results:
        kinds = {_kind(name) for each in card.results for name in each.metrics}
        head["metrics"] = sorted(kinds)
        results = [
            {
                "task": {"type": each.task},
                "dataset": {"type": each.dataset, "name": each.dataset},
                "metrics": [
                    {"type": _kind(name), "name": name, "value": round(value, 6)}
                    for name, value in each.metrics.items()
                ],
            }
            for each in card.results
        ]
        head["model-index"] = [{"name": card.name, "results": results}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _kind(name: str) -> str:
    """The metric that a name is of, as the hub calls it.

    Example:
        >>> _kind("image_to_text_recall@1"), _kind("acc5"), _kind("median_rank")
        ('recall', 'accuracy', 'median_rank')
    """
    if "recall" in name:
        return "recall"
    return "accuracy" if name.startswith("acc") else name


def _model(built: BuiltModel, to: Form | None) -> list[str]:
    """Say what the features are made of, and how many of their dimensions may be used."""
    lines = [
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
    else:
        size = built.image_size
        height, width = (size, size) if isinstance(size, int) else size
        lines.append(
            f"Pictures are resized to {height} x {width} pixels ({built.resize_mode}, "
            f"{built.interpolation}), texts cut to {built.context_length} tokens."
        )
    if built.prefix_dims:
        dims = ", ".join(map(str, built.prefix_dims))
        lines.append(
            f"Trained at prefixes (Matryoshka): the first {dims} dimensions can be used alone. Cut "
            "features, then divide them by their length again."
        )
    return lines


def _checked(said: Mapping[str, Any]) -> list[str]:
    """Say what reading the files back has shown."""
    text = (
        f"Read back, an entry of a feature differs by {said['largest_difference']:.1e} at most "
        "from the model that was trained."
    )
    lowered = said.get("lowered")
    if lowered is None:
        return [text]
    text = (
        f"The graphs compute in {said['precision']}: the cosine of a feature and that of the model "
        f"in fp32 is at least {lowered['lowest_cosine']:.4f} on a few random inputs."
    )
    rows = [
        f"| {name} | {before:.4f} | {after:.4f} |"
        for name, (before, after) in lowered.get("metrics", {}).items()
    ]
    if not rows:
        return [text]
    return [
        text,
        "",
        f"| {escaped(lowered['pairs'])} | fp32 | {said['precision']} |",
        "|---|---|---|",
        *rows,
    ]


def _licence(card: Card) -> str:
    if card.licence == UNSTATED:
        return (
            "None was stated (`other`): ask whoever published this before you use it, and mind "
            "the licences of the data and of weights it began with."
        )
    return f"`{card.licence}`, for the weights in this folder."


def check_push(repository: str, licence: str = UNSTATED) -> None:
    """Check what a push needs, before anything is computed.

    Args:
        repository: ORG/NAME.
        licence: that the card will state; the hub is asked whether it knows it.

    Raises:
        UserError: If the name is none, ``huggingface_hub`` is missing, nobody is logged in, or the
            hub does not know the licence or refuses to answer.
        OutageError: If it cannot be reached, or answers later.
    """
    hub = _logged_in(repository)
    try:
        hub.ModelCard(f"---\nlicense: {licence}\n---\n").validate()
    except ValueError as error:
        raise UserError(
            f"license ({licence}) is refused by the hub: {_said(error)}; other states none"
        ) from error
    except Exception as error:  # of one of three HTTP libraries, by its version
        raise _kind_of(error)(
            f"push ({repository}) cannot ask the hub, so nothing was pushed: {_said(error)}"
        ) from error


def _logged_in(repository: str) -> Any:
    """Return ``huggingface_hub``, where the name is one and there is a token."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"push ({repository}) must be ORG/NAME, such as me/my-siglip")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError('push needs huggingface_hub; run: pip install "dist-siglip[remote]"')
    hub: Any = importlib.import_module("huggingface_hub")
    if not hub.get_token():
        raise UserError(
            f"push ({repository}) needs a token that may write; run hf auth login, or set HF_TOKEN"
        )
    return hub


def push_folder(
    folder: Path, repository: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload a folder to the Hugging Face hub in one commit: all of its files, or none.

    The hub checks the card first. The repository is made if there is none, and a branch of that
    name. Files of earlier pushes that ``folder`` lacks stay. The token is that of ``hf auth login``
    or HF_TOKEN.

    Args:
        folder: an export, with its card.
        repository: ORG/NAME.
        private: make the repository so; one that is public already is refused.
        revision: branch; None is main.

    Returns:
        Address of the commit.

    Raises:
        UserError: If the hub refuses, or the repository is public and must not be.
        OutageError: If it cannot be reached, or answers later. Both say what is there.
    """
    hub = _logged_in(repository)
    api = hub.HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        hub.CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files
    ]
    left = "nothing was pushed"
    try:
        hub.ModelCard.load(folder / "README.md").validate()
        api.create_repo(repository, private=private or None, exist_ok=True)
        left = "no file was pushed; the repository was made if there was none"
        is_open = private and not api.model_info(repository).private
        if not is_open:
            if revision is not None and revision != "main":
                api.create_branch(repository, branch=revision, exist_ok=True)
            # Apart from the commit, so that it is known which of both fails.
            api.preupload_lfs_files(repository, additions=operations, revision=revision)
            left = "no file was pushed, or all if the hub's answer was lost; look at its commits"
            # upload_folder may make several commits of it.
            done = api.create_commit(
                repository, operations, commit_message="Upload model", revision=revision
            )
    except Exception as error:  # of one of three HTTP libraries, by its version, or a ValueError
        raise _kind_of(error)(f"push ({repository}) failed, {left}: {_said(error)}") from error
    if is_open:
        raise UserError(
            f"private (true), but {repository} is public already, so nothing was pushed; make it "
            "private on the hub, or push to another name"
        )
    return str(done.commit_url)


def _kind_of(error: Exception) -> type[UserError | OutageError]:
    """Whether the same push may work later: the hub does not answer, is ill, or asks to wait."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return OutageError if status >= 500 or status == 429 else UserError
    homes = {each.__module__.partition(".")[0].rstrip("0123456789") for each in type(error).__mro__}
    return OutageError if homes & _NETWORK else UserError


def _said(error: Exception) -> str:
    """What the hub said, in one line and without the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    hub: Any = importlib.import_module("huggingface_hub")
    token = hub.get_token()
    return redact(text.replace(token, "...") if token else text)[:_MOST_LETTERS]


__all__ = ["Card", "Form", "Result", "check_push", "escaped", "push_folder", "write_card"]
