"""What patch tokens know of places, on pictures with masks: votes, a linear map, pointing, texts.

Patches of the pictures of one split teach, those of another are asked. A patch has the class of
most of its pixels. Votes come from a bank of patches of bounded size, chosen by a seed; the linear
map is fitted to all of them. Neither depends on how many ranks share the pictures.
"""

import hashlib
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.handwriting import DIGITS, check_numbers, draw_masked_numbers
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.patches import patch_mask
from dist_siglip.data.samples.picture_policy import MAX_IMAGE_PIXELS, PicturePolicy
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.classification import class_vectors, read_templates
from dist_siglip.evaluation.encoding import rank_and_size
from dist_siglip.evaluation.patches.masked_pictures import (
    MaskedFiles,
    MaskedFolder,
    MaskedPicture,
    MaskedSource,
    masked_batches,
)
from dist_siglip.evaluation.patches.measures import PatchBank, PatchCounts, Patches
from dist_siglip.evaluation.patches.overlays import ShownPictures
from dist_siglip.metrics.dense import (
    label_map_sums,
    patch_labels,
    problem_of_ridge,
    solve_label_map,
    vote_labels,
)
from dist_siglip.metrics.rows import check_same_settings, raise_together
from dist_siglip.metrics.tiles import exact_similarity
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.image_tokens import require_image_tokens

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """How patches are labelled from others, and how pictures are read.

    Args:
        k: nearest patches of the bank that vote.
        temperature: of the votes, see ``metrics.vote_labels``.
        bank_patches: most patches in the bank, of all ranks together. Of more, those with the
            lowest of random numbers are taken, one drawn for each patch from seed and picture.
        seed: of these numbers.
        ridge: of the linear map, see ``metrics.linear_label_map``; all patches fit it.
        local_batch_size: pictures that a rank encodes together.
        workers_per_rank: loader processes of each rank; 0 loads in its own.
    """

    k: int = 10
    temperature: float = 0.07
    bank_patches: int = 20_000
    seed: int = 0
    ridge: float = 1e-2
    local_batch_size: int = 32
    workers_per_rank: int = 2

    def check(self) -> None:
        """Refuse numbers out of range."""
        check_least(
            1,
            of="settings.",
            k=self.k,
            bank_patches=self.bank_patches,
            local_batch_size=self.local_batch_size,
        )
        check_least(0, of="settings.", seed=self.seed, workers_per_rank=self.workers_per_rank)
        if not 0 < self.temperature < math.inf:
            raise UserError(f"settings.temperature ({self.temperature}) must be above 0; try 0.07")
        if problem := problem_of_ridge(self.ridge):
            raise UserError(f"settings.{problem}")


class _Sources(NamedTuple):
    """Pictures that teach, pictures that are asked, and the K classes of both.

    Attributes:
        train: teach.
        test: are asked.
        classes: names.
        background: number of the class that is no object; None if all are objects.
        facts: what must be equal on all ranks.
    """

    train: MaskedSource
    test: MaskedSource
    classes: list[str]
    background: int | None
    facts: dict[str, object]


class _DenseBenchmark(Benchmark):
    """Evaluates patches, wherever pictures and masks come from."""

    def __init__(
        self, name: str, templates: str | list[str], background: str | None, settings: PatchSettings
    ) -> None:
        super().__init__(name)
        self._templates = templates
        self._background = background
        self._settings = settings

    @abstractmethod
    def sources(self) -> _Sources:
        """Find pictures and classes; ``UserError`` says what is wrong with them."""

    def check(self) -> None:
        """Find what is wrong with settings, names of files, and the first picture of each split."""
        super().check()
        self._settings.check()
        read_templates(self._templates, [])
        sources = self.sources()
        try:
            for source in (sources.train, sources.test):
                source.read(0, PicturePolicy())
        except BadSampleError as error:
            raise UserError(f"benchmark {self.name!r}: {error}") from error

    def check_towers(self, towers: DualEncoder) -> None:
        """Refuse an image tower without patch tokens."""
        require_image_tokens(towers.clip.visual)

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Label the patches of the second split; see the base class for the contract.

        Memory of a rank: one batch, the bank and a copy of it in float64, and sums of
        (C + 1)(C + 1 + K) numbers.

        Raises:
            UserError: on every rank: the model gives no patch tokens, a picture or mask cannot be
                used, no patch has a class, or tokens are not finite.
        """
        sources, settings = self.sources(), self._settings
        check_same_settings(sources.facts, device=model.device, group=group)
        num_classes, background = len(sources.classes), sources.background
        templates = read_templates(self._templates, [])
        texts = class_vectors(model, sources.classes, templates, group=group)
        bank = PatchBank(settings.bank_patches, settings.seed)
        own_sums: Tensor | None = None
        for batch in self._encode(model, sources.train, num_classes, group):
            bank.add(batch)
            part = label_map_sums(batch.tokens.flatten(0, 1), batch.labels.flatten(), num_classes)
            own_sums = part if own_sums is None else own_sums.add_(part)
        assert own_sums is not None  # every rank has a batch
        sums = sum_over_ranks(own_sums, group)
        if not bool(sums.isfinite().all()):
            raise UserError(
                f"patch tokens of benchmark {self.name!r} hold a value that is not finite; the "
                "model has diverged: use an earlier checkpoint or a lower learning rate"
            )
        taught = int(sums[-1, -num_classes:].sum())  # the constant meets every class
        self._refuse_nothing(taught, "train")
        label_map = solve_label_map(sums, settings.ridge)
        bank_tokens, bank_labels = bank.shared_out(group)
        found = PatchCounts(num_classes, background, model.device)
        shown = ShownPictures(len(sources.test))
        for batch in self._encode(model, sources.test, num_classes, group):
            tokens = batch.tokens.flatten(0, 1)
            votes = vote_labels(
                tokens,
                bank_tokens,
                bank_labels,
                num_classes,
                k=settings.k,
                temperature=settings.temperature,
                group=group,
            )
            shape = (*batch.labels.shape, num_classes)
            scores = {
                "knn": votes.view(shape),
                "linear": (F.pad(tokens.double(), (0, 1), value=1.0) @ label_map).view(shape),
                "text": exact_similarity(batch.features.flatten(0, 1), texts).view(shape),
            }
            if batch.padding is not None:  # is never the best of its picture
                hidden = batch.padding[:, :, None]
                scores = {way: s.masked_fill(hidden, -math.inf) for way, s in scores.items()}
            told = found.add(scores, batch.labels)
            shown.add(batch.numbers, batch.pixels, {"mask": batch.labels, **told}, batch.grid)
        found.sum_over_ranks(group)
        self._refuse_nothing(found.num_patches, "test")
        metrics, details = found.summarise(sources.classes)
        return BenchmarkResult(
            metrics,
            {
                "train_pictures": len(sources.train),
                "train_patches": taught,
                "bank_patches": min(taught, settings.bank_patches),
                "pictures": len(sources.test),
                "templates": templates,
                **details,
                "examples": shown.render(sources.classes, background, group),
            },
        )

    def _encode(
        self,
        model: EvaluatedModel,
        source: MaskedSource,
        num_classes: int,
        group: ProcessGroup | None,
    ) -> Iterator[Patches]:
        """Encode this rank's share, in equally many batches on every rank."""
        if model.encode_patches is None:
            raise UserError(f"the model gives no patch tokens, which benchmark {self.name!r} needs")
        (rank, world_size), settings = rank_and_size(group), self._settings
        batches = masked_batches(
            source,
            model.inputs,
            rank=rank,
            world_size=world_size,
            local_batch_size=settings.local_batch_size,
            workers=settings.workers_per_rank,
        )
        last_line = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            problem = f"benchmark {self.name!r}: {batch.problem}" if batch.problem else None
            raise_together(problem, device=model.device, group=group)
            encoded = model.encode_patches(batch.pixels)
            count = len(batch.numbers)
            exists = patch_mask(batch.pixels[:count])
            grid = None
            if exists is None:
                height, width = encoded.patch_size
                grid = batch.pixels.shape[2] // height, batch.pixels.shape[3] // width
            masks = batch.masks.to(model.device)
            yield Patches(
                batch.numbers,
                batch.pixels[:count],
                encoded.tokens[:count].float(),
                encoded.features[:count],
                patch_labels(masks, encoded.patch_size, num_classes),
                grid,
                None if exists is None else ~exists.to(model.device),
            )
            if rank == 0 and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                _LOGGER.info("benchmark %s: batch %d", self.name, number)
                last_line = time.monotonic()

    def _refuse_nothing(self, num_patches: int, split: str) -> None:
        if not num_patches:
            raise UserError(
                f"no patch of the {split} pictures of benchmark {self.name!r} has a class; look at "
                "masks, classes and ignore"
            )

    def _background_of(self, classes: Sequence[str]) -> int | None:
        """Number of the class that is no object."""
        if self._background is None:
            return None
        if self._background in classes:
            return list(classes).index(self._background)
        if self._background == "background":  # the default; not every data set has one
            return None
        raise UserError(
            f"background ({self._background!r}) of benchmark {self.name!r} must be one of its "
            "classes, or null if all of them are objects"
        )


class PatchSegmentation(_DenseBenchmark):
    """Patches of pictures with masks, from a folder.

    Metrics:

    - ``knn_mean_iou``, ``knn_accuracy``: votes of the nearest patches of the train split;
    - ``linear_mean_iou``, ``linear_accuracy``: the linear map; accuracies leave background out;
    - ``linear_pointing``, ``text_pointing``: the best patch of a class, by the map and by the
      cosine with its text, lies on the object;
    - ``patch_to_text_recall@1``, ``text_to_patch_map``: as ``metrics.patch_text_retrieval``;
    - ``text_mean_iou``: the nearest text, over patches of objects.

    Args:
        folder: of the data set, in the layout of Pascal VOC (VOC2012), of ADE20k
            (ADEChallengeData2016), or images/train, masks/train, images/val, masks/val.
        classes: names of the labels: a list from 0 on, or a text, JSON or YAML file. Null: such a
            file in the folder, or VOC's names; see ``read_label_names``.
        name: of this benchmark.
        train: split that teaches. Null: train, or training.
        test: split that is asked. Null: val, or validation.
        ignore: labels of pixels that count nowhere. Null: 255, and in ADE20k's layout 0.
        background: name of the class that is no object, if there is one; null if all are objects.
        templates: "openai", "simple", a list, or a text or YAML file. Null: a photo of a {c}.
        max_image_pixels: pictures and masks with more are refused.
        settings: how patches are labelled.
    """

    task = "patch_segmentation"

    def __init__(
        self,
        folder: str,
        classes: str | list[str] | None = None,
        name: str = "patch_segmentation",
        train: str | None = None,
        test: str | None = None,
        ignore: list[int] | None = None,
        background: str | None = "background",
        templates: str | list[str] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        settings: PatchSettings = PatchSettings(),
    ) -> None:
        super().__init__(name, templates or ["a photo of a {c}."], background, settings)
        self._folder = MaskedFolder(folder, classes, ignore, name=name)
        self._train = train
        self._test = test
        self._max_image_pixels = max_image_pixels

    def sources(self) -> _Sources:
        """List the pictures of both splits."""
        check_least(1, max_image_pixels=self._max_image_pixels)
        train = self._folder.files(self._train, "train", "training")
        test = self._folder.files(self._test, "val", "validation")
        labels = self._folder.labels()
        names = "\n".join(each.picture.name for each in (*train, *test)).encode()
        facts = {
            "train pictures": len(train),
            "test pictures": len(test),
            "classes": labels.names,
            "names of pictures": hashlib.sha256(names).hexdigest()[:16],
        }
        return _Sources(
            MaskedFiles(train, labels, self._max_image_pixels),
            MaskedFiles(test, labels, self._max_image_pixels),
            labels.names,
            self._background_of(labels.names),
            facts,
        )


class HandwritingPatches(_DenseBenchmark):
    """Patches of pictures of handwritten digits, drawn as those of the quickstart; needs no data.

    The class of a pixel is the digit in whose box it lies. Metrics: those of ``PatchSegmentation``;
    texts are the names of the digits.

    Args:
        name: of this benchmark.
        train_pictures: that teach.
        test_pictures: that are asked; of other handwriting.
        digits_per_image: 2 to 6.
        image_size: side of a picture in pixels, before the model's own size.
        seed: of the pictures.
        templates: likewise; null: the name of the digit alone.
        settings: how patches are labelled.
    """

    task = "patch_segmentation"

    def __init__(
        self,
        name: str = "handwriting_patches",
        train_pictures: int = 400,
        test_pictures: int = 200,
        digits_per_image: int = 4,
        image_size: int = 64,
        seed: int = 0,
        templates: str | list[str] | None = None,
        settings: PatchSettings = PatchSettings(),
    ) -> None:
        super().__init__(name, templates or ["{c}"], "background", settings)
        self._counts = (train_pictures, test_pictures)
        self._digits_per_image = digits_per_image
        self._image_size = image_size
        self._seed = seed

    def sources(self) -> _Sources:
        """Draw nothing yet: pictures are drawn where they are read."""
        train, test = self._counts
        check_least(1, train_pictures=train, test_pictures=test)
        check_numbers(self._digits_per_image, self._image_size, self._seed)
        classes = [*DIGITS, "background"]
        return _Sources(
            _Numbers(self, train, is_training=True),
            _Numbers(self, test, is_training=False),
            classes,
            len(DIGITS),
            {"pictures": self._counts, "seed": self._seed},
        )

    def draw(self, count: int, *, is_training: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Draw pictures and masks of one split."""
        return draw_masked_numbers(
            count,
            is_training=is_training,
            digits_per_image=self._digits_per_image,
            image_size=self._image_size,
            seed=self._seed,
        )


class _Numbers:
    """Pictures of numbers, drawn when the first is read."""

    def __init__(self, benchmark: HandwritingPatches, count: int, *, is_training: bool) -> None:
        self._benchmark = benchmark
        self._count = count
        self._is_training = is_training
        self._drawn: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._count

    def read(self, number: int, policy: PicturePolicy) -> MaskedPicture:
        """Read one; see ``MaskedSource``."""
        if self._drawn is None:
            self._drawn = self._benchmark.draw(self._count, is_training=self._is_training)
        pictures, masks = self._drawn
        return MaskedPicture(Image.fromarray(pictures[number]), masks[number].astype(np.int16))
