"""Floating-point operations of towers, losses and objectives, from the sizes of a model.

A multiplication and an addition are two. Matrix products count and nothing else, forward and for
one pair; ``Part.times`` says how often a training step does them: once forward, twice backward, and
again where backward makes the result anew.

With T tokens, width C, MLP width M, l layers, vocabulary V, P patches, and L positions of the rows
that the decoder writes:

    blocks              l (T (8 C^2 + 4 C M) + 4 T^2 C)
    decoder, body       l (L (12 C^2 + 4 C M) + 4 L^2 C + 4 L P C)
    decoder, patches    l 4 P C_tower C                   keys and values
    decoder, logits     2 L C V
    pairwise loss       2 N D                             N pairs, D columns
    logits of teachers  2 N (D_1 + ... + D_K)             once for each pass of the loss
    head of prototypes  2 (C H + H^2 + H D)               hidden width H, D numbers, a vector
    its logits          2 D K                             K prototypes
    scores of curation  4 r N (D + D_1 + ... + D_K)       r pairs brought for each that trains,
                                                          less the columns of the last chunk
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from open_clip.transformer import VisionTransformer as OwnVisionTransformer
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, build_dual_encoder
from dist_siglip.objectives import (
    Captioning,
    MaskedPrediction,
    SelfDistillation,
    TeacherObjective,
)
from dist_siglip.training.module.curation import CurationConfig

FORWARD_ALONE = 1
FORWARD_AND_BACKWARD = 3
_MADE_TWICE = 4


class Part(NamedTuple):
    """Operations of one part of a training step.

    Attributes:
        name: of the part.
        forward: FLOPs of one pair.
        times: that a step does as many.
    """

    name: str
    forward: float
    times: int = FORWARD_AND_BACKWARD

    @property
    def step(self) -> float:
        """FLOPs of one pair in a training step."""
        return self.forward * self.times


class Blocks(NamedTuple):
    """Sizes of plain transformer blocks.

    Attributes:
        tokens: that attend to one another.
        width: channels of a token.
        mlp_width: channels inside of the MLP.
        layers: blocks.
    """

    tokens: int
    width: int
    mlp_width: int
    layers: int

    @property
    def flops(self) -> float:
        """FLOPs of a pass."""
        tokens, width, mlp_width, layers = self
        return layers * (tokens * (8 * width + 4 * mlp_width) + 4.0 * tokens**2) * width


class Towers(NamedTuple):
    """Sizes of a dual encoder of two transformers.

    Attributes:
        image: blocks of the image tower.
        text: blocks of the text tower.
        num_patches: P.
        patch_values: numbers of a patch.
        embed_dim: D.
        pool_mlp_width: of an attention pooling, 0 without one.
        projections: numbers of the matrices behind pooling, of images and of texts.
    """

    image: Blocks
    text: Blocks
    num_patches: int
    patch_values: int
    embed_dim: int
    pool_mlp_width: int = 0
    projections: tuple[int, int] = (0, 0)

    @property
    def parts(self) -> list[Part]:
        """The towers, and the pooling of the image tower where it attends."""
        found = [
            Part("image tower", self._view(self.num_patches) + 2 * self.projections[0]),
            Part("text tower", self.text.flops + 2 * self.projections[1]),
        ]
        if self.pool_mlp_width:
            found.insert(1, Part("attention pooling", self._pool(self.num_patches)))
        return found

    def view_flops(self, num_patches: int) -> float:
        """FLOPs of a pass of the image tower, pooling included, over so many patches."""
        pool = self._pool(num_patches) if self.pool_mlp_width else 0.0
        return self._view(num_patches) + pool

    def _view(self, num_patches: int) -> float:
        prefix = self.image.tokens - self.num_patches
        blocks = self.image._replace(tokens=prefix + num_patches).flops
        return 2.0 * num_patches * self.patch_values * self.image.width + blocks

    def _pool(self, num_patches: int) -> float:
        width = self.image.width
        row = 4.0 * width + 4 * self.pool_mlp_width  # of the one query: in, out, MLP
        return width * (row + num_patches * (4 * width + 4))

    @classmethod
    def of(cls, built: BuiltModel) -> "Towers":
        """Read the sizes of a model.

        Raises:
            UserError: if a tower is no plain transformer of open_clip's own or of timm.
        """
        clip: Any = built.encoder.clip
        num_patches = built.encoder.image_token_shape(built.image_size).num_tokens
        visual, pool_mlp_width = clip.visual, 0
        tower = visual.trunk if isinstance(visual, TimmModel) else visual
        if isinstance(tower, VisionTransformer):
            image = Blocks(
                num_patches + tower.num_prefix_tokens,
                tower.embed_dim,
                tower.blocks[0].mlp.fc1.out_features,
                len(tower.blocks),
            )
            patches, projections = tower.patch_embed.proj, _matrix_numbers(visual.head)
            if isinstance(tower.attn_pool, AttentionPoolLatent):
                pool_mlp_width = tower.attn_pool.mlp.fc1.out_features
        elif isinstance(tower, OwnVisionTransformer):
            blocks = tower.transformer.resblocks
            prefix = tower.positional_embedding.shape[0] - num_patches
            image = _own_blocks(num_patches + prefix, blocks)
            patches, projections = tower.conv1, 0 if tower.proj is None else tower.proj.numel()
        else:
            raise _no_plain(tower)
        text = getattr(clip, "text", clip)
        if text is not clip and not isinstance(text, TextTransformer):
            raise _no_plain(text)
        projection = text.text_projection
        return cls(
            image,
            _own_blocks(text.positional_embedding.shape[0], text.transformer.resblocks),
            num_patches,
            patches.weight[0].numel(),
            built.embed_dim,
            pool_mlp_width,
            (
                projections,
                _matrix_numbers(projection)
                if isinstance(projection, nn.Module)
                else 0
                if projection is None
                else projection.numel(),
            ),
        )


class Decoder(NamedTuple):
    """Sizes of a decoder with attention to the patches.

    Attributes:
        blocks: as those of a tower; tokens are the positions of the rows of all tasks.
        num_patches: P.
        patch_width: channels of a patch token.
        vocab_size: V.
    """

    blocks: Blocks
    num_patches: int
    patch_width: int
    vocab_size: int

    @property
    def parts(self) -> list[Part]:
        """Body, keys and values of the patches, and logits, which are made twice."""
        length, width, _, layers = self.blocks
        queries = layers * length * (4.0 * width + 4 * self.num_patches) * width
        patches = layers * 4.0 * self.num_patches * self.patch_width * width
        logits = 2.0 * length * width * self.vocab_size
        return [
            Part("decoder, body", self.blocks.flops + queries),
            Part("decoder, keys and values of patches", patches),
            Part("decoder, logits", logits, _MADE_TWICE),
        ]


def pair_loss(columns: int, global_batch_size: int, *, is_softmax: bool = False) -> Part:
    """Return the pairwise loss over ``columns`` of features, all prefixes of them together.

    The softmax loss makes its logits once for the sums and again for the gradients.
    """
    times = _MADE_TWICE if is_softmax else FORWARD_AND_BACKWARD
    return Part("pairwise loss", 2.0 * columns * global_batch_size, times)


def loss_parts(
    loss: Mapping[str, Any], embed_dim: int, global_batch_size: int, teacher_dims: Sequence[int]
) -> list[Part] | None:
    """Return the parts of a loss by its settings; None if it is not known.

    Args:
        loss: class path and arguments; empty for the sigmoid loss.
        embed_dim: D.
        global_batch_size: N.
        teacher_dims: columns of each teacher.
    """
    name, settings = _class_name(loss), loss.get("init_args") or {}
    base = settings.get("base") or {}
    if name in ("", "SigLipLoss", "ClipLoss"):
        parts = [pair_loss(embed_dim, global_batch_size, is_softmax=name == "ClipLoss")]
        if settings.get("mined_negatives"):
            parts.append(Part("mined negatives", 2.0 * embed_dim * global_batch_size, 1))
        return parts
    if name == "MatryoshkaLoss":
        columns, is_softmax = sum(settings["dims"]), _class_name(base) == "ClipLoss"
        return [pair_loss(columns, global_batch_size, is_softmax=is_softmax)]
    if name != "DistillationLoss":
        return None
    is_softmax = settings.get("form") == "softmax"
    student = pair_loss(embed_dim, global_batch_size, is_softmax=is_softmax)
    teachers = 2.0 * sum(teacher_dims) * global_batch_size
    parts = [
        student._replace(name="distillation, student"),
        Part("distillation, teachers", teachers, 1 + is_softmax),
    ]
    # A base of the same kind is computed in the passes of distillation.
    kind = _class_name(base)
    is_alike = kind == "ClipLoss" if is_softmax else kind in ("", "SigLipLoss")
    of_own = base.get("init_args") or {}
    is_joined = is_alike and not (of_own.get("duplicates") or of_own.get("mined_negatives"))
    if settings.get("share", 0.75) == 1 or is_joined:
        return parts
    of_base = loss_parts(base, embed_dim, global_batch_size, teacher_dims)
    return None if of_base is None else of_base + parts


def caption_parts(built: BuiltModel, settings: Mapping[str, Any]) -> list[Part]:
    """Return what ``Captioning`` with these settings adds to a model."""
    shape = built.encoder.image_token_shape(built.image_size)
    with torch.device("meta"):
        objective = Captioning(**settings)
        objective.build(built, shape)
    decoder = objective.decoder
    longest, width = decoder.positions.shape
    length = built.context_length + (len(objective.tasks) - 1) * longest  # rows go through together
    inner: Any = decoder.blocks[0]
    blocks = Blocks(length, width, inner.mlp[1].out_features, len(decoder.blocks))
    return Decoder(blocks, *shape, len(objective.output.weight)).parts


def teacher_parts(built: BuiltModel, entries: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return what objectives with one teacher add to a model: its pass, then views and heads."""
    shape = built.encoder.image_token_shape(built.image_size)
    towers = Towers.of(built)
    whole = towers.view_flops(towers.num_patches)
    parts = [Part("teacher, global view", whole, FORWARD_ALONE)]
    for entry in entries:
        with torch.device("meta"):
            objective: TeacherObjective = _OF_TEACHERS[_class_name(entry)](
                **entry.get("init_args", {})
            )
            objective.build(built, shape)
        if isinstance(objective, MaskedPrediction):
            seen = shape.num_tokens if objective.all_patches else objective.num_hidden
            told, vectors = seen, seen
            parts.append(Part("global view with hidden patches", whole))
        else:
            views = objective.views
            pixels = towers.patch_values / 3
            told, vectors = 1, views.local_views
            local = towers.view_flops(round(views.local_size**2 / pixels))
            parts.append(Part("local views", views.local_views * local))
        row = 2.0 * sum(each.numel() for each in objective.head.mlp.parameters() if each.ndim == 2)
        logits = 2.0 * objective.head.directions.numel()
        name = objective.name.replace("_", " ")
        parts += [
            Part(f"{name}, head", vectors * row),
            Part(f"{name}, logits", vectors * logits, _MADE_TWICE),
            Part(f"{name}, head of the teacher", told * row, FORWARD_ALONE),
            Part(f"{name}, logits of the teacher", told * logits, 2 * FORWARD_ALONE),
        ]
    return parts


def step_parts(
    built: BuiltModel, settings: Mapping[str, Mapping[str, Any]], global_batch_size: int
) -> list[Part] | None:
    """Return the parts of a training step with a loss and objectives; None if one is not known.

    Args:
        built: towers.
        settings: of a run, of which model.loss, model.teachers, model.objectives, model.curation
            and weights and negatives of data.captions count.
        global_batch_size: N, pairs that train.

    Raises:
        UserError: as ``Towers.of``, and as an objective says.
    """
    model = settings.get("model", {})
    captions = settings.get("data", {}).get("captions") or {}
    num_captions = len(captions.get("weights") or [1])
    num_negatives = captions.get("num_negatives", 1) if captions.get("negatives") else 0
    teachers = _teachers(model.get("teachers") or [])
    if teachers is None:
        return None
    of_teachers, dims = teachers
    of_loss = loss_parts(model.get("loss") or {}, built.embed_dim, global_batch_size, dims)
    if of_loss is None:
        return None
    *of_images, of_texts = of_towers = Towers.of(built).parts
    num_texts, meetings = num_captions + num_negatives, num_captions * (1 + num_negatives)
    parts = [
        *of_images,
        of_texts._replace(forward=of_texts.forward * num_texts),
        *(each._replace(forward=each.forward * meetings) for each in of_loss),
    ]
    objectives = model.get("objectives") or []
    with_teacher = [each for each in objectives if _class_name(each) in _OF_TEACHERS]
    if with_teacher:
        parts += teacher_parts(built, with_teacher)
    for objective in objectives:
        if objective in with_teacher:
            continue
        count = _COUNTED.get(_class_name(objective))
        if count is None:
            return None
        parts += count(built, objective.get("init_args", {}))
    curation = model.get("curation")
    if curation is None:
        return parts + of_teachers
    rule = CurationConfig(**curation)
    brought = 1 / (1 - rule.filter_ratio)
    columns = global_batch_size * (1 - 1 / rule.chunks)
    return [
        *parts,
        *(
            Part(f"curation, {each.name}", brought * each.forward, FORWARD_ALONE)
            for each in (*of_towers, *of_teachers)
        ),
        Part("curation, scores", brought * 4 * (built.embed_dim + sum(dims)) * columns, 1),
    ]


def _teachers(entries: Sequence[Mapping[str, Any]]) -> tuple[list[Part], list[int]] | None:
    """Towers of live teachers, forward alone, and columns of all; None if those are not known."""
    parts, dims = [], []
    for entry in entries:
        model, dim = entry.get("model"), entry.get("dim")
        if model is not None:
            with torch.device("meta"):
                built = build_dual_encoder(model)
            dim = dim or built.embed_dim
            if entry.get("features") is None:
                parts += [
                    Part(f"teacher, {part.name}", part.forward, FORWARD_ALONE)
                    for part in Towers.of(built).parts
                ]
        if dim is None:
            return None
        dims.append(dim)
    return parts, dims


def step_flops_of(parts: Sequence[Part]) -> float:
    """FLOPs of one pair in a training step of all parts."""
    return sum(part.step for part in parts)


_COUNTED: dict[str, Callable[[BuiltModel, Mapping[str, Any]], list[Part]]] = {
    "Captioning": caption_parts
}
_OF_TEACHERS: dict[str, Callable[..., TeacherObjective]] = {
    "MaskedPrediction": MaskedPrediction,
    "SelfDistillation": SelfDistillation,
}


def _class_name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("class_path", "")).rpartition(".")[2]


def _own_blocks(tokens: int, blocks: Any) -> Blocks:
    """Sizes of open_clip's own blocks."""
    inner = blocks[0].mlp.c_fc
    return Blocks(tokens, inner.in_features, inner.out_features, len(blocks))


def _matrix_numbers(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.ndim == 2)


def _no_plain(tower: nn.Module) -> UserError:
    return UserError(
        f"objectives are counted for transformers of open_clip or timm alone, not for "
        f"{type(tower).__name__}; choose another model, or leave objectives out"
    )
