"""Teachers of distillation and curation: run live on the batch, or read from stored rows.

A teacher is no part of the module: no parameter, no entry of a checkpoint or an export, nothing
that strategies wrap, optimizers step or averages average. It is read from its own weights at each
start, so a run goes on bit for bit.

A live teacher sees the crop that the student sees, resampled on the device to its size, and the
same caption, in tokens of its own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.cached_features import TOWERS, CachedFeatures, Tower
from dist_siglip.data.samples.transforms import TeacherInputs
from dist_siglip.errors import UserError
from dist_siglip.losses import DistillationLoss, TeacherFeatures
from dist_siglip.losses.arguments import LossOverBase, uses_teachers
from dist_siglip.losses.calibration import describe_batch_change
from dist_siglip.losses.distillation import check_teacher_logits
from dist_siglip.models import BuiltModel, DualEncoder, build_dual_encoder
from dist_siglip.models import compile_towers as translate_towers
from dist_siglip.models.build import tower_fingerprint
from dist_siglip.models.text_tower import ModelTokenizer

logger = logging.getLogger(__name__)

_WHOLE = frozenset({"squash", "longest"})  # resize modes that show the whole picture


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher: live by its ``model``, stored by its ``features``, or rows that shards bring.

    Args:
        model: an open_clip architecture, path of a JSON config, ``local-dir:PATH`` (of open_clip or
            transformers) or ``hf-hub:ORG/REPO``, that encodes every batch. With ``features``: the
            model that the rows must be of. Null: rows alone.
        pretrained: weights of ``model``: a tag, or a local file.
        weights_average: of weights with an average beside them, as ``model.weights_average``.
        features: folder or folders of ``dist-siglip embed --format features``. Null without
            ``model``: the batches bring the rows, as those of ``data.datacompdr``.
        dim: columns of the rows; null takes what is there.
        scale: logit scale, > 0. Null takes that of the weights, or what the folder says of them.
        bias: added to the logits; the sigmoid form needs it. Null likewise.
        other_crops: read ``features`` of whole pictures though the student sees random crops: the
            targets are then those of another picture than the student's, more so the smaller the
            crops.
    """

    model: str | None = None
    pretrained: str | None = None
    weights_average: bool | None = None
    features: str | list[str] | None = None
    dim: int | None = None
    scale: float | None = None
    bias: float | None = None
    other_crops: bool = False


class _Teacher:
    """One teacher; ``dim``, ``scale`` and ``bias`` as far as they are known."""

    def __init__(self, config: TeacherConfig, number: int) -> None:
        self.name = f"teachers[{number}]"
        self.folders = (
            (config.features,) if isinstance(config.features, str) else tuple(config.features or ())
        )
        self.other_crops = config.other_crops
        self.dim, self.scale, self.bias = config.dim, config.scale, config.bias
        self.digests: dict[Tower, str] = {}
        self.encoder: DualEncoder | None = None
        self.tokenizer: Any = None
        self.trained_global_batch: int | None = None
        if config.model is None:
            if config.pretrained is not None or config.weights_average is not None:
                raise UserError(
                    f"{self.name}.pretrained ({config.pretrained}) is of a model; name model, too"
                )
        else:
            self._build(config, config.model)
        if self.other_crops and not self.folders:
            raise UserError(f"{self.name}.other_crops (true) is of features; leave it out")

    def _build(self, config: TeacherConfig, model: str) -> None:
        # On the CPU even where the student awaits its values; the student's start is not moved.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            built = build_dual_encoder(
                model,
                config.pretrained,
                weights_average=config.weights_average,
                warns_of_logits=False,
            )
        if not built.weights_loaded:
            raise UserError(
                f"{self.name}.model ({model}) has no weights ({min(built.random_parameters)} would "
                "be random); name pretrained, or a folder that brings them"
            )
        self.take_logits(built.own_scale, built.own_bias, built.trained_global_batch)
        self.take_dim(built.embed_dim)
        if self.folders:
            self.digests = {tower: tower_fingerprint(built, tower) for tower in TOWERS}
            return
        self.encoder = built.encoder.eval().requires_grad_(False)
        self.tokenizer = built.tokenizer
        self.context_length = built.context_length
        size = built.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.interpolation = "bilinear" if built.interpolation == "bilinear" else "bicubic"

    @property
    def has_rows(self) -> bool:
        """Whether its features come with the batch."""
        return self.encoder is None

    def take_logits(
        self, scale: float | None, bias: float | None, trained_global_batch: int | None
    ) -> None:
        """Take what the weights say where the settings leave it open."""
        self.scale = scale if self.scale is None else self.scale
        if self.bias is None:
            self.bias, self.trained_global_batch = bias, trained_global_batch

    def take_dim(self, dim: int) -> None:
        """Compare the width with what is known of it."""
        if self.dim not in (None, dim):
            raise UserError(
                f"{self.name}.dim ({self.dim}) differs from the {dim} columns of its features; "
                "leave it out"
            )
        self.dim = dim

    def take_rows(self, features: CachedFeatures, student_resize_mode: str) -> None:
        """Check that rows are those of this teacher and of what the student sees.

        Raises:
            UserError: unless they are.
        """
        for tower, digest in self.digests.items():
            if features.digests[tower] != digest:
                raise UserError(
                    f"{self.name}.features are not those of {self.name}.model: another {tower} "
                    "tower, other weights or other preprocessing; embed the shards with it"
                )
        widths = {features.width(tower) for tower in TOWERS}
        if len(widths) > 1:
            raise UserError(f"{self.name}.features have {sorted(widths)} columns; embed again")
        self.take_dim(widths.pop())
        said = features.manifest
        self.take_logits(
            said.get("logit_scale"), said.get("logit_bias"), said.get("global_batch_size")
        )
        mode = said.get("resize_mode")
        is_same = mode == student_resize_mode or {mode, student_resize_mode} <= _WHOLE
        if mode is not None and not is_same and not self.other_crops:
            raise UserError(
                f"{self.name}.features show another part of the pictures (resize_mode {mode}) than "
                f"the student sees ({student_resize_mode}); take it as a live teacher, or set "
                "other_crops: true to train on that mismatch"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, texts: Tensor, micro_batch_size: int) -> tuple[Tensor, Tensor]:
        """Encode pixels (B, 3, H, W) uint8 and its tokens (B, L) to (B, d) each, L2-normalised."""
        encoder = self.encoder
        assert encoder is not None
        if next(encoder.parameters()).device != images.device:
            encoder.to(images.device)
        found = [
            (encoder.encode_image(self._resampled(pixels)), encoder.encode_text(tokens))
            for pixels, tokens in zip(
                images.split(micro_batch_size), texts.split(micro_batch_size), strict=True
            )
        ]
        image_rows, text_rows = zip(*found, strict=True)
        return torch.cat(image_rows), torch.cat(text_rows)

    def _resampled(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] == self.image_size:
            return pixels
        resized = F.interpolate(
            pixels.float(), self.image_size, mode=self.interpolation, antialias=True
        )
        return resized.round_().clamp_(0, 255).to(torch.uint8)


class Teachers:
    """The teachers of a module, in their order; no ``nn.Module``, so that nothing registers them.

    Args:
        asked: as configured.
        student: what the towers were built as.
        loss: of the run.
        is_reference: whether pairs are chosen by what they say (``CurationConfig``).

    Attributes:
        inputs: what the data must bring for them.

    Raises:
        UserError: if teachers and loss do not go together, a teacher has no weights or cannot be
            loaded without running code, or its scale or bias is not known.
    """

    def __init__(
        self,
        asked: Sequence[TeacherConfig],
        student: BuiltModel,
        loss: nn.Module,
        *,
        is_reference: bool = False,
    ) -> None:
        if is_reference and not asked:
            raise UserError("curation needs a reference model; list it in model.teachers")
        if bool(asked) != (uses_teachers(loss) or is_reference):
            raise UserError(
                f"loss ({type(loss).__name__}) takes no teachers, and model.teachers names "
                f"{len(asked)}; set loss to dist_siglip.losses.DistillationLoss, or curation"
                if asked
                else f"loss ({type(loss).__name__}) needs teachers; list them in model.teachers"
            )
        self._form = "sigmoid" if is_reference else _form_of(loss)
        self._teachers = [_Teacher(config, number) for number, config in enumerate(asked)]
        self._resize_mode = student.resize_mode
        stored = [each.folders for each in self._teachers if each.folders]
        self._from_batch = [e for e in self._teachers if e.has_rows and not e.folders]
        if stored and self._from_batch:
            raise UserError(
                f"{self._from_batch[0].name} has neither model nor features, and other teachers "
                "have features: rows are read from folders or from the shards; give it one"
            )
        live = [each for each in self._teachers if not each.has_rows]
        if live and student.patches is not None:
            raise UserError(
                f"{live[0].name} would see the patches of the student, whose pictures have any "
                "shape (NaFlex); store its rows, and name them as features"
            )
        self._own_tokens = [e for e in live if not _tokens_alike(e.tokenizer, student.tokenizer)]
        self.inputs = TeacherInputs(
            tokenizers=tuple(each.tokenizer for each in self._own_tokens),
            features=tuple(stored),
            other_crops=bool(stored)
            and all(each.other_crops for each in self._teachers if each.folders),
            live=bool(live),
        )
        self._check_logits([each for each in self._teachers if not each.folders])

    def __bool__(self) -> bool:
        return bool(self._teachers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teachers":
        """An average of the module shares them."""
        return self

    def check_data(self, data: object) -> None:
        """Check that a data module brings what the teachers need.

        Args:
            data: data module; what another one than ours brings is checked at the first batch.

        Raises:
            UserError: if stored rows are of another teacher, or live ones would see nothing.
        """
        if not self:
            return
        features: CachedFeatures | None = getattr(data, "features", None)
        if features is not None and self.inputs.live:
            raise UserError(
                f"train_features stand in for the {features.towers[0]} tower, and a live teacher "
                "needs pictures and captions; store its rows, too, and name them as "
                "teachers.features"
            )
        reinforced = getattr(data, "datacompdr", None)
        if self._from_batch and reinforced is not None:
            if len(reinforced.dims) != len(self._from_batch):
                raise UserError(
                    f"data.datacompdr.dims ({list(reinforced.dims)}) are of {len(reinforced.dims)} "
                    f"teachers, and {len(self._from_batch)} of model.teachers have neither model "
                    "nor features; list one for each"
                )
            for each, dim in zip(self._from_batch, reinforced.dims, strict=True):
                each.take_dim(dim)
        elif reinforced is not None and self.inputs.features:
            raise UserError(
                "data.datacompdr replays crops, and teachers.features are of whole pictures; leave "
                "one of the two out"
            )
        if (
            reinforced is not None
            and reinforced.caption_weights
            and len(self._from_batch) < len(self._teachers)
        ):
            raise UserError(
                "data.datacompdr.synthetic (beside): model.teachers that are live, or have "
                "features of their own, answer to one caption of each pair; set it to drawn"
            )
        opened: Sequence[CachedFeatures] = getattr(data, "teacher_features", ())
        stored = [each for each in self._teachers if each.folders]
        if opened:
            for each, rows in zip(stored, opened, strict=True):
                each.take_rows(rows, self._resize_mode)
            self._check_logits(stored)

    def warn_of_batch(self, global_batch_size: int | None) -> None:
        """Warn of biases that were trained for another global batch than that of the run."""
        for each in self._teachers:
            trained = each.trained_global_batch
            is_other = None not in (trained, global_batch_size) and trained != global_batch_size
            if self._form == "sigmoid" and is_other:
                text = describe_batch_change(int(trained or 0), int(global_batch_size or 0))
                remedy = "set its bias where that matters"
                logger.warning("%s %s; %s", each.name, text.partition(";")[0], remedy)

    def compile(self, backend: str = "inductor") -> None:
        """Translate live teachers with torch.compile at their first use."""
        for each in self._teachers:
            if each.encoder is not None:
                translate_towers(each.encoder, backend=backend)

    def features_of(self, batch: ImageTextBatch, micro_batch_size: int | None) -> TeacherFeatures:
        """Return what all teachers say about a batch, in their order.

        Raises:
            UserError: if the batch brings no rows or tokens, or of another width, or pixels that
                are normalised already.
        """
        stored = self._stored_blocks(batch)
        tokens = self._own_texts(batch)
        blocks = []
        for each in self._teachers:
            if each.has_rows:
                blocks.append(next(stored))
                continue
            if batch.images.dtype != torch.uint8:
                raise UserError(
                    f"images ({batch.images.dtype}) must be uint8 for a live teacher, which "
                    "normalises them in its own way"
                )
            texts = tokens[each.name] if each in self._own_tokens else batch.texts
            size = micro_batch_size or max(len(texts), 1)
            blocks.append(each.encode(batch.images, texts, size))
        image, text = (torch.cat(side, dim=1) for side in zip(*blocks, strict=True))
        return TeacherFeatures(
            image,
            text,
            tuple(rows.shape[1] for rows, _ in blocks),
            tuple(float(each.scale or 0.0) for each in self._teachers),
            tuple(each.bias for each in self._teachers),
        )

    def _stored_blocks(self, batch: ImageTextBatch) -> Any:
        """Cut the rows that the batch brings into those of each teacher."""
        stored = [each for each in self._teachers if each.has_rows]
        if not stored:
            return iter(())
        given = (batch.teacher_image_features, batch.teacher_text_features)
        image, text = given
        if image is None or text is None:
            raise UserError(
                f"{stored[0].name} needs rows of a teacher in every batch; name its features, or "
                "set data.datacompdr for shards that have them"
            )
        if len(stored) == 1 and stored[0].dim is None:
            stored[0].dim = image.shape[1]
        if batch.more_texts is not None:  # rows of each caption, one behind the other
            count = 1 + batch.more_texts.shape[1]
            if text.shape[1] != count * image.shape[1]:
                raise UserError(
                    f"rows of teachers for texts ({text.shape[1]}) must be those of {count} "
                    f"captions of {image.shape[1]} numbers"
                )
            text = torch.cat(text.tensor_split(count, dim=1))
        dims = [each.dim for each in stored]
        if None in dims or not sum(d or 0 for d in dims) == image.shape[1] == text.shape[1]:
            raise UserError(
                f"rows of teachers have {image.shape[1]} and {text.shape[1]} columns, and "
                f"model.teachers want dims {dims}; give dim of each"
            )
        sizes = [int(d or 0) for d in dims]
        return iter(list(zip(image.split(sizes, dim=1), text.split(sizes, dim=1), strict=True)))

    def _own_texts(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Token rows of the teachers that have a tokenizer of their own, by name."""
        sizes = [each.context_length for each in self._own_tokens]
        if not sizes:
            return {}
        if batch.teacher_texts is None or batch.teacher_texts.shape[1] != sum(sizes):
            raise UserError(
                f"{self._own_tokens[0].name} needs tokens of its own in every batch; collate with "
                "PairCollator(tokenizer, module.inputs.teachers.tokenizers)"
            )
        texts = batch.teacher_texts.split(sizes, dim=1)
        return {each.name: rows for each, rows in zip(self._own_tokens, texts, strict=True)}

    def _check_logits(self, teachers: Sequence[_Teacher]) -> None:
        for each in teachers:
            check_teacher_logits((1,), (each.scale,), (each.bias,), self._form, (each.name,))


def _form_of(loss: nn.Module) -> str:
    """Form that the logits of teachers must be good for; softmax, which needs less, by default."""
    while isinstance(loss, LossOverBase):
        if isinstance(loss, DistillationLoss):
            return loss.form
        loss = loss.base
    return "softmax"


def _tokens_alike(tokenizer: object, other: object) -> bool:
    return isinstance(tokenizer, ModelTokenizer) and tokenizer.makes_tokens_of(other)
