"""Training of small towers on pictures of digits, and what is measured of them.

The step is that of a run: one pass of each tower, a pairwise loss of the features, and the terms
of an objective on patch tokens or views beside it.
"""

import math
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.lab.digit_scenes import (
    BACKGROUND,
    NUM_CLASSES,
    Scenes,
    build_digit_towers,
    draw_repeated,
    draw_scenes,
    token_table,
)
from dist_siglip.lab.digit_views import SelfTaught
from dist_siglip.losses import (
    DistillationLoss,
    LogitScaleBias,
    MatryoshkaLoss,
    SigLipLoss,
    TeacherFeatures,
)
from dist_siglip.losses.research.curation import LearnabilityScores, choose_learnable
from dist_siglip.metrics import (
    cut_rows,
    linear_label_map,
    pca_rotation,
    pointing_accuracy,
    recall_at_k,
    retrieval_ranks_both_ways,
    segmentation,
    vote_labels,
)
from dist_siglip.objectives import (
    Captioning,
    MaskedPrediction,
    Regions,
    Rows,
    SelfDistillation,
    TeacherObjective,
)
from dist_siglip.objectives.captioning import Task

POOL = 20_000  # pictures to train on
BATCH, LEARNING_RATE = 64, 4e-3
SHARE_WRONG = 0.4  # of captions, where some are
CURATION_CHUNKS = 16
CUTS = (16, 8)  # dimensions that features are cut to
CURVE_POINTS = 8
_WARMUP = 50
_HELD_OUT, _DENSE, _ROTATED = 600, 300, 2000  # pictures measured
_BOX_BINS = 16
VIEWS_START = 0.1  # share of the steps before an objective on views begins, with weight 1
PROTOTYPES = 256
# Of self-distillation alone: few steps, as there is one digit in a picture.
ALONE_STEPS, ALONE_PROTOTYPES = 240, 64
_ALONE_POOL, _ALONE_WIDTH, _ALONE_RATE, _ALONE_CROP = 4000, 32, 1e-3, 12
_VOTERS = 1000
# Of words and positions of the decoder, and 0.02 in a wide one: at that, one of 48 channels is slow
# to learn which of the two boxes a text means.
_DECODER_STD = 0.5
Numbers = dict[str, float]
Views = Literal["hidden patches", "small crops"]


class Arm(NamedTuple):
    """What is trained.

    Attributes:
        width: channels of the towers.
        tasks: of the captioning decoder.
        dims: prefixes of the Matryoshka loss.
        wrong: share of captions that are those of other pictures.
        is_distilled: whether it learns from the teacher, too.
        is_curated: whether each batch is chosen from one twice as large, with the teacher as the
            reference.
        views: that it learns from what an average of itself says.
    """

    width: int = 48
    tasks: tuple[Task, ...] = ()
    dims: tuple[int, ...] = ()
    wrong: float = 0.0
    is_distilled: bool = False
    is_curated: bool = False
    views: Views | None = None


class Trained(NamedTuple):
    """Measures of an arm.

    Attributes:
        curve: recall@1 at equal distances, the last one at the end; of self-distillation alone the
            entropy of the teacher's choice, as a share of that of a guess.
        early: all measures, a third of the way.
        late: all measures at the end.
    """

    curve: list[float]
    early: Numbers
    late: Numbers


class Teacher(NamedTuple):
    """Features of a trained pair of towers: of the training pictures, and of every caption id."""

    pictures: Tensor
    captions: Tensor
    scale: float
    bias: float

    def features(self, rows: Tensor, captions: Tensor) -> TeacherFeatures:
        """Return what is said of some pictures and as many captions."""
        return TeacherFeatures(
            self.pictures[rows],
            self.captions[captions],
            dims=(self.pictures.shape[1],),
            scales=(self.scale,),
            biases=(self.bias,),
        )


class DigitTraining:
    """The training of one arm, and what is measured of it.

    Args:
        arm: what is trained.
        scenes: ``POOL`` pictures to train on.
        seed: of values, order of the batches, and the pictures measured.
        steps: of the training.
        teacher: of an arm that is distilled or curated.
    """

    def __init__(
        self, arm: Arm, scenes: Scenes, *, seed: int, steps: int, teacher: Teacher | None = None
    ) -> None:
        self.arm, self.scenes, self.steps = arm, scenes, steps
        self.held_out = draw_scenes(_HELD_OUT, is_training=False, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        built = build_digit_towers(arm.width, seed)
        self.towers = built.encoder
        self.logits = LogitScaleBias(10.0, -5.0)
        self.loss = _loss_of(arm)
        self.teacher = teacher if arm.is_distilled or arm.is_curated else None
        self.wrong_chosen: list[float] = []  # share of each step
        self.objective: Captioning | None = None
        if arm.tasks:
            self.objective = Captioning(tasks=arm.tasks, box_bins=_BOX_BINS, layers=2)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.objective.build(built, self.towers.image_token_shape(16))
            decoder = self.objective.decoder
            for values in (decoder.embedding.weight, decoder.positions):
                nn.init.normal_(values, std=_DECODER_STD, generator=self.generator)
        self.views: SelfTaught | None = None
        if arm.views is not None:
            self.views = SelfTaught(
                _objective_on(arm.views), built, seed=seed, steps=steps, crop_size=_CROP
            )
        on_views = None if self.views is None else self.views.objective
        modules = (self.towers, self.logits, self.loss, self.objective, on_views)
        self.parameters = [
            p for module in modules if module is not None for p in module.parameters()
        ]
        self.caption_rows, self.digit_rows = token_table()
        self.captions = scenes.caption_ids
        if arm.wrong:
            wrong = torch.rand(POOL, generator=self.generator) < arm.wrong
            others = self.captions[torch.randperm(POOL, generator=self.generator)]
            self.captions = torch.where(wrong, others, self.captions)

    def run(self) -> Trained:
        """Train, and measure on the way."""
        steps = self.steps
        optimizer = torch.optim.AdamW(
            self.parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        curve: list[float] = []
        early: Numbers = {}
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _warm_cosine(step, steps)
            optimizer.zero_grad()
            self._loss(step).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            if self.views is not None:
                self.views.follow()
            if (step + 1) * CURVE_POINTS % steps < CURVE_POINTS:
                curve.append(self.measure_recall()["recall@1"])
            if step + 1 == steps // 3:
                early = self.measure()
        return Trained(curve, early, self.measure())

    def _loss(self, step: int) -> Tensor:
        rows = torch.randint(POOL, (BATCH,), generator=self.generator)
        if self.arm.is_curated and self.teacher is not None:
            rows = self._curated(rows, self.teacher)
        captions = self.captions[rows]
        pictures, token_rows = self.scenes.pixels(rows), self.caption_rows[captions]
        if self.views is not None:
            images, term = self.views.encode(pictures, token_rows, step)
        else:
            images, tokens = self.towers.encode_image_tokens(pictures)
        texts = self.towers.encode_text(token_rows)
        pairs = (images, texts, *self.logits())
        if self.teacher is None or self.arm.is_curated:
            loss: Tensor = self.loss(*pairs, caption_ids=captions)
        else:
            teachers = self.teacher.features(rows, captions)
            loss = self.loss(*pairs, caption_ids=captions, teachers=teachers)
        if self.objective is not None:
            draws = torch.randint(2**62, (BATCH,), generator=self.generator)
            terms = self.objective(self.rows_of(self.scenes, rows, tokens, draws))
            loss = loss + sum(each.total / each.number for each in terms.values())
        return loss if self.views is None else loss + term

    @torch.no_grad()
    def _curated(self, rows: Tensor, reference: Teacher) -> Tensor:
        """Choose as many rows out of these and as many more."""
        rows = torch.cat([rows, torch.randint(POOL, (BATCH,), generator=self.generator)])
        captions = self.captions[rows]
        images = self.towers.encode_image(self.scenes.pixels(rows))
        texts = self.towers.encode_text(self.caption_rows[captions])
        scale, bias = (float(value) for value in self.logits())
        learner = Teacher(images, texts, scale, bias).features(*[torch.arange(len(rows))] * 2)
        scores = LearnabilityScores(
            learner, reference.features(rows, captions), captions, "positive"
        )
        noise = torch.rand(len(rows), CURATION_CHUNKS, generator=self.generator)
        chosen = rows[choose_learnable(scores, noise, BATCH).positions]
        is_wrong = self.captions[chosen] != self.scenes.caption_ids[chosen]
        self.wrong_chosen.append(float(is_wrong.float().mean()))
        return chosen

    def rows_of(self, scenes: Scenes, rows: Tensor, tokens: Tensor, draws: Tensor) -> Rows:
        """Rows of an objective, with one digit of each picture as its region."""
        digits, boxes = scenes.digits[rows], scenes.boxes[rows]
        which, every = draws % 2, torch.arange(len(rows))
        # Of two equal digits nobody could tell which one is meant: no region.
        boxes = boxes[every, which] * (digits[:, :1] != digits[:, 1:])
        regions = Regions(self.digit_rows[digits[every, which]], boxes)
        texts = self.caption_rows[scenes.caption_ids[rows]]
        return Rows(tokens, texts, draws, torch.ones(len(rows), dtype=torch.bool), regions)

    @torch.no_grad()
    def as_teacher(self) -> Teacher:
        """Features of all training pictures and captions."""
        parts = torch.arange(POOL).split(500)
        pictures = [self.towers.encode_image(self.scenes.pixels(part)) for part in parts]
        scale, bias = (float(value) for value in self.logits())
        captions = self.towers.encode_text(self.caption_rows)
        return Teacher(torch.cat(pictures), captions, scale, bias)

    @torch.no_grad()
    def measure_recall(self, *, is_cut: bool = False) -> Numbers:
        """Recall@1 of pictures not trained on, whole and cut; equal captions are pairs."""
        held_out = self.held_out
        pictures = self.towers.encode_image(held_out.pixels(slice(None)))
        texts = self.towers.encode_text(self.caption_rows)[held_out.caption_ids]
        found = {"recall@1": _recall(pictures, texts, held_out.caption_ids)}
        if is_cut:
            rotation = pca_rotation(self.towers.encode_image(self.scenes.pixels(slice(_ROTATED))))
            for dim in CUTS:
                for way, turned in (("first", None), ("PCA to", rotation)):
                    found[f"recall@1, {way} {dim}"] = _recall(
                        cut_rows(pictures, dim, turned),
                        cut_rows(texts, dim, turned),
                        held_out.caption_ids,
                    )
        return found

    @torch.no_grad()
    def measure(self) -> Numbers:
        """All measures of pictures that were not trained on."""
        is_plain = not self.arm.tasks and self.views is None
        found = self.measure_recall(is_cut=self.arm.width > 32 and is_plain)
        if self.wrong_chosen:
            found["wrong captions chosen"] = fmean(self.wrong_chosen[-self.steps // 3 :])
        if self.views is not None:
            found |= _of_teacher(self.views)
        held_out = self.held_out
        tokens = self.towers.encode_image_tokens(held_out.pixels(slice(_DENSE)))[1]
        labels = held_out.patch_labels[:_DENSE]
        known = self.towers.encode_image_tokens(self.scenes.pixels(slice(_DENSE)))[1]
        bank, bank_labels = known.flatten(0, 1), self.scenes.patch_labels[:_DENSE].flatten()
        votes = vote_labels(tokens.flatten(0, 1), bank, bank_labels, NUM_CLASSES)
        told = segmentation(
            votes.argmax(dim=1), labels.flatten(), NUM_CLASSES, background=BACKGROUND
        )
        by_map = F.pad(tokens.double(), (0, 1), value=1.0) @ linear_label_map(
            bank, bank_labels, NUM_CLASSES
        )
        found |= {
            "patch accuracy": told.accuracy,
            "mIoU": told.mean_iou,
            "pointing": pointing_accuracy(by_map, labels, background=BACKGROUND),
        }
        if self.objective is not None and len(self.arm.tasks) > 1:
            every = torch.arange(_HELD_OUT)
            tokens = self.towers.encode_image_tokens(held_out.pixels(every))[1]
            terms = self.objective.measure(self.rows_of(held_out, every, tokens, every))
            found["box exact"] = float(terms["box_exact"].total / terms["box_exact"].number)
        return found


class Alone(NamedTuple):
    """Self-distillation without any other loss, of towers that see one digit four times.

    Attributes:
        teacher_temperature: the student's is 0.1.
        is_centred: whether a centre follows the teacher's logits.
    """

    teacher_temperature: float = 0.02
    is_centred: bool = True

    def run(self, seed: int) -> Trained:
        """Train for ``ALONE_STEPS``, and measure on the way; early is before the first step."""
        pictures, digits = draw_repeated(_ALONE_POOL, is_training=True, seed=seed)
        held_out, held_out_digits = draw_repeated(_HELD_OUT, is_training=False, seed=seed)
        built = build_digit_towers(_ALONE_WIDTH, seed)
        objective = SelfDistillation(
            local_views=4,
            local_size=_ALONE_CROP,
            **_heads(ALONE_PROTOTYPES, 64, self.teacher_temperature),
            centre_momentum=_CENTRE_MOMENTUM if self.is_centred else _NEVER,
        )
        views = SelfTaught(objective, built, seed=seed, steps=ALONE_STEPS, crop_size=_ALONE_CROP)
        generator = torch.Generator().manual_seed(seed)
        parameters = [*built.encoder.clip.visual.parameters(), *objective.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, _ALONE_RATE, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )

        @torch.no_grad()
        def votes() -> Numbers:
            """Digits that the 10 nearest pooled vectors of training pictures tell right."""
            bank, asked = (
                built.encoder.encode_view(each.expand(-1, 3, -1, -1))[0]
                for each in (pictures[:_VOTERS], held_out)
            )
            told = vote_labels(asked, bank, digits[:_VOTERS], 10).argmax(dim=1)
            return {"digits told": float((told == held_out_digits).float().mean())}

        early = votes()
        curve: list[float] = []
        no_texts = torch.zeros(BATCH, 1, dtype=torch.long)
        for step in range(ALONE_STEPS):
            optimizer.param_groups[0]["lr"] = _ALONE_RATE * _warm_cosine(step, ALONE_STEPS)
            rows = torch.randint(_ALONE_POOL, (BATCH,), generator=generator)
            optimizer.zero_grad()
            views.encode(pictures[rows].expand(-1, 3, -1, -1), no_texts, step)[1].backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if (step + 1) * CURVE_POINTS % ALONE_STEPS < CURVE_POINTS:
                curve.append(views.gauges()["entropy"])
            views.follow()
        return Trained(curve, early, votes() | _of_teacher(views))


_CENTRE_MOMENTUM = 0.5  # at 0.9 the centre is late in few steps
_NEVER = 1 - 1e-9  # a momentum at which the centre stays 0
_CROP = 8  # pixels


def _warm_cosine(step: int, steps: int) -> float:
    """Share of the learning rate: it rises, then falls like a cosine."""
    return min((step + 1) / _WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)


def _heads(prototypes: int, hidden: int, temperature: float) -> dict[str, Any]:
    """Settings of a small head, and one temperature of the teacher for all steps."""
    return {
        "prototypes": prototypes,
        "hidden": hidden,
        "bottleneck": hidden // 4,
        "teacher_temperature": temperature,
        "first_teacher_temperature": temperature,
        "temperature_steps": 0,
    }


def _objective_on(views: Views) -> TeacherObjective:
    """The objective on some views, beside the loss of pairs."""
    heads = _heads(PROTOTYPES, 128, 0.04)
    if views == "hidden patches":
        return MaskedPrediction(weight=1.0, start=VIEWS_START, **heads)
    return SelfDistillation(weight=1.0, start=VIEWS_START, local_views=4, local_size=_CROP, **heads)


def _of_teacher(views: SelfTaught) -> Numbers:
    return {f"teacher's {name}": value for name, value in views.gauges().items()}


def _loss_of(arm: Arm) -> nn.Module:
    sigmoid = SigLipLoss(duplicates="positive")
    if arm.is_distilled:
        return DistillationLoss(sigmoid)
    return MatryoshkaLoss(list(arm.dims), sigmoid) if arm.dims else sigmoid


def _recall(pictures: Tensor, texts: Tensor, caption_ids: Tensor) -> float:
    """Mean recall@1 of both directions."""
    ranks = retrieval_ranks_both_ways(pictures, texts, caption_ids, caption_ids)
    return fmean(recall_at_k(each, 1) for each in ranks)
