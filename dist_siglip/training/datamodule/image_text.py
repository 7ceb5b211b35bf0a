"""Data module over webdataset shards, resumable at any sample.

It checks the data before anything starts and gives every rank its slice of each global batch.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import DataLoader

from dist_siglip.data.index.damage import MAX_BAD_FRACTION, OnDamage
from dist_siglip.data.index.pairs import check_ranks_agree
from dist_siglip.data.order.position import (
    BLOCK_SHARDS,
    BatchPlan,
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Progress,
    SequenceLengths,
    check_divisible,
)
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.remote.cache import Prefetcher
from dist_siglip.data.samples.augmentations import Replay
from dist_siglip.data.samples.bad_samples import BadSampleLimit
from dist_siglip.data.samples.batch import PairSample
from dist_siglip.data.samples.cached_features import CachedFeatures
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.datacompdr import MEMBERS, DataCompDR, ReinforcedSamples
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.identity import PICTURE_BYTES
from dist_siglip.data.samples.picture_policy import (
    AUTO,
    FORMATS,
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    ExifOrientation,
    PictureFormat,
    TruncatedPictures,
    with_formats,
)
from dist_siglip.data.samples.regions import RegionRule
from dist_siglip.data.samples.stages import Stage, check_stages
from dist_siglip.data.samples.transforms import (
    CropResize,
    ImageTransform,
    Preprocessing,
    ViewTransform,
    evaluation_transform,
    training_transform,
)
from dist_siglip.errors import UserError, check_least
from dist_siglip.health.start_check import check_ranks_started_alike
from dist_siglip.training.datamodule.named_fields import (
    check_captions,
    check_regions,
    check_shares,
)
from dist_siglip.training.datamodule.sources import ShardTables, TrainSource
from dist_siglip.training.datamodule.stored_features import load_features, load_teacher_features
from dist_siglip.training.datamodule.training_position import (
    TrainingPosition,
    batches_to_repeat,
    count_first,
    position_to_resume_at,
    refuse_accumulation,
)
from dist_siglip.training.datamodule.transfer import BatchTransfer, start_prefetching

_LOGGER = logging.getLogger(__name__)


class ImageTextDataModule(BatchTransfer):
    """Pairs of pictures and captions from webdataset shards, exact to the sample.

    Order, crops and the cut into global batches depend on the data, ``seed``,
    ``global_batch_size`` and ``block_shards`` alone, not on ranks or loader processes. A checkpoint
    of any step resumes with the next sample. The training loader has no end: run it with
    ``Trainer(max_epochs=-1, max_steps=..., use_distributed_sampler=False)``.

    Args:
        train_shards: webdataset shards or Parquet files to train on: a .tar or .parquet file, a
            folder of them, a pattern such as "train/{00000..00127}.tar" or "data/**/*.parquet", a
            URL (http, https, s3, gs, hf), a .txt file with one of these a line, or a list. Null: no
            training.
        train_sources: sources of a mixture, instead of ``train_shards``; each goes through its own
            epochs, at the pace of its weight.
        val_shards: shards to evaluate on. Null: no validation.
        inputs: preprocessing of the model; the command line fills it in.
        global_batch_size: pairs of one training batch over all ranks; they must divide it.
        val_local_batch_size: pairs of one evaluation batch on each rank.
        workers_per_rank: loader processes of each rank; 0 loads in the training process.
        prefetch_factor: batches that the loader processes of a rank prepare ahead, all together, in
            pieces of 256 pairs; each process prepares at least so many pieces.
        seed: of sample order and augmentation, >= 0.
        block_shards: shards shuffled together; more mixes better, fewer reads more locally.
        train_crop_scale: share of the picture's area a random training crop keeps, (least, most).
            Null turns augmentation off.
        scaled_decode: decode JPEGs for training at the scale the crop needs: same crops, much
            faster for large pictures. False: open_clip's pixels, to the bit.
        image_extensions: members, or columns of Parquet, that are the picture of a sample, in order
            of preference.
        captions: where the captions of a sample are, and which one it gets.
        stages: class paths of steps of your own between decoding and transform, functions from an
            iterator of samples to an iterator of samples, as webdataset has them. One with an
            attribute picture_mode "RGBA" or "stored" gets pictures with their alpha, or in the
            mode of the file; others get RGB. dist_siglip.data.RandomFlip, ColorJitter, RandAugment,
            RandomAffine and TimmAugment are such steps; evaluations leave them out.
        max_image_pixels: pictures with more pixels count as bad samples. The one limit there is.
        formats: of pictures that are decoded: jpeg, png, webp, avif, gif (its first frame), tiff
            (its first page), bmp, heic (which needs the extra "heic"). Those that are named beyond
            the first three add their extensions to ``image_extensions``, unless you set them.
        intensity_window: the values of grey pictures of 16 bits, 32 bits or fractions that become
            black and white, [low, high]. Null: 0 and 65535.
        transparency: colour that pictures with transparency are laid on, "#rrggbb" (in quotes, in
            YAML) or a name; or drop: their alpha is left out, and what it hid shows. auto: as the
            folder of the model says, else white.
        exif_orientation: ignore what a camera says of up and down, as open_clip does, or apply
            it. auto: as the folder of the model says, else ignore.
        truncated_pictures: a JPEG or PNG that ends too early: "replace" it as any bad sample, or
            "use" what there is of it.
        on_damage: "refuse" damaged shards and incomplete samples before training, or "skip" them,
            up to ``max_bad_fraction`` of the shards and of the samples.
        max_bad_fraction: share of training samples that may be bad (they are replaced).
        bad_sample_log: file for a JSON line about every bad sample. The command line takes
            bad_samples.jsonl in the run folder if it is null; a script then writes none.
        cache: copies of remote shards on each node.
        train_features: folder or folders of ``dist-siglip embed --format features``, read in place
            of the pictures (or captions) that a locked tower would encode.
        datacompdr: what the training shards hold if they are reinforced as DataCompDR: stored
            augmentations, which are replayed, synthetic captions and rows of teachers. Null: these
            members are not read.
        picture_id: when two pictures are the same, as rows of one picture with several captions
            have it: "bytes", if their files are equal; the name of a field in their .json member,
            as ``captions.json_field``, if it is (the bytes where it is missing); null, never.
        regions: where regions of pictures are, texts with boxes, for objectives that need them.
        sequence_lengths: most patches of training pictures of a NaFlex tower: one length is drawn
            for each global batch, from seed and number of the batch. Null: 128, 256, 576, 784, 1024
            for such a tower. Evaluations have ``model.num_patches``.
        length_weights: how often each of ``sequence_lengths`` is drawn, in relation to the others.
            Null draws all alike.
        accept_changed_data: resume although the training shards changed since the checkpoint: a
            single source begins its next epoch, a mixture keeps its position.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self,
        train_shards: str | list[str] | None = None,
        val_shards: str | list[str] | None = None,
        inputs: Preprocessing | None = None,
        global_batch_size: int = 256,
        val_local_batch_size: int = 256,
        workers_per_rank: int = 2,
        prefetch_factor: int = 2,
        seed: int = 0,
        block_shards: int = BLOCK_SHARDS,
        train_crop_scale: tuple[float, float] | None = (0.9, 1.0),
        image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        train_sources: list[TrainSource] | None = None,
        accept_changed_data: bool = False,
        scaled_decode: bool = True,
        captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
        stages: list[Stage] | None = None,
        on_damage: OnDamage = "refuse",
        bad_sample_log: str | None = None,
        cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
        train_features: str | list[str] | None = None,
        datacompdr: DataCompDR | None = None,
        picture_id: str | None = PICTURE_BYTES,
        transparency: str = AUTO,
        exif_orientation: ExifOrientation | Literal["auto"] = AUTO,
        truncated_pictures: TruncatedPictures = "replace",
        formats: tuple[PictureFormat, ...] = FORMATS,
        intensity_window: tuple[float, float] | None = None,
        regions: RegionRule = RegionRule(),  # noqa: B008 - frozen dataclass
        sequence_lengths: list[int] | None = None,
        length_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_least(
            1,
            global_batch_size=global_batch_size,
            val_local_batch_size=val_local_batch_size,
            prefetch_factor=prefetch_factor,
            block_shards=block_shards,
        )
        check_least(0, workers_per_rank=workers_per_rank, seed=seed)
        check_shares(max_bad_fraction, train_crop_scale)
        captions.check()
        regions.check()
        cache.check()
        if picture_id == "":
            raise UserError(
                'picture_id ("") must be bytes, the name of a field of the .json, or null'
            )
        if datacompdr is not None:
            datacompdr.check()
            datacompdr.check_settings(
                captions=captions,
                num_stages=len(stages or ()),
                train_crop_scale=train_crop_scale,
                train_features=train_features,
            )
        reads_json = picture_id not in (None, PICTURE_BYTES) or regions.json_field is not None
        others = ("json",) if reads_json else ()
        self.cache = ShardCache(cache)
        self.tables = ShardTables(
            train_shards=train_shards,
            train_sources=train_sources,
            val_shards=val_shards,
            image_extensions=with_formats(image_extensions, formats),
            caption_extensions=captions.members,
            other_extensions=others if datacompdr is None else (*others, *MEMBERS),
            on_damage=on_damage,
            max_bad_fraction=max_bad_fraction,
            cache=self.cache,
        )
        self.val_shards = val_shards
        self.inputs = inputs
        self._asked_lengths = (sequence_lengths, length_weights)
        _ = self.lengths  # checks them
        self.global_batch_size = global_batch_size
        self.val_local_batch_size = val_local_batch_size
        self.workers_per_rank = workers_per_rank
        self.prefetch_factor = prefetch_factor
        self.seed = seed
        self.block_shards = block_shards
        self.train_crop_scale = train_crop_scale
        self._picture_settings = {
            "transparency": transparency,
            "exif_orientation": exif_orientation,
            "truncated_pictures": truncated_pictures,
            "max_image_pixels": max_image_pixels,
            "formats": tuple(formats),
            "intensity_window": intensity_window,
        }
        _ = self.pictures  # checks them
        self.scaled_decode = scaled_decode
        self.captions = captions
        self.regions = regions
        self.stages = check_stages(stages or [], reads_regions=regions.json_field is not None)
        self.bad_sample_log = bad_sample_log
        self.picture_id = picture_id
        self.train_features = train_features
        self.datacompdr = datacompdr
        if datacompdr is not None and self.lengths is not None:
            raise UserError(
                "datacompdr replays crops of one size, and pictures of the image tower have any "
                "shape (NaFlex); leave one of the two out"
            )
        self.max_incomplete = max_bad_fraction if on_damage == "skip" else 0.0
        self.features: CachedFeatures | None = None
        self.teacher_features: tuple[CachedFeatures, ...] = ()
        self.position = TrainingPosition(accept_changed_data=accept_changed_data)
        self.train_dataset: PairDataset | None = None
        self.val_dataset: PairDataset | None = None
        self._prefetcher: Prefetcher | None = None
        self.start_facts: dict[str, str] = {}  # what ranks must share beside the data
        self.bad_samples = BadSampleLimit(max_bad_fraction)

    @property
    def plan(self) -> BatchPlan | None:
        """The sequence of training batches; None before ``setup("fit")``."""
        return self.position.plan

    @property
    def lengths(self) -> SequenceLengths | None:
        """How long the pictures of training batches are; None where they have one size."""
        is_flexible = self.inputs is not None and self.inputs.patches is not None
        return SequenceLengths.of(self._asked_lengths, is_flexible=is_flexible)

    @property
    def progress(self) -> Progress:
        """How far training has come."""
        return self.position.progress

    def check(self, world_size: int) -> None:
        """Find what is wrong with data and batch sizes before any rank is started.

        Reads shard headers (and leaves side-cars), no picture.

        Raises:
            UserError: if shards or features are missing or damaged, there is nothing to do, or the
                global batch does not fit the data or the ``world_size`` ranks of the run.
        """
        if not self.tables.trains and self.val_shards is None:
            raise UserError("train_shards and val_shards are both null; set at least one")
        if self.tables.trains:
            check_divisible(self.global_batch_size, world_size)
            self._make_plan()
            self._open_features()
            self._reinforced()
        if self.val_shards is not None:
            self.tables.of("val_shards")

    def check_position(self, state: Mapping[str, Any], remedy: str) -> None:
        """Check that the data would go on where a checkpoint was written, before ranks start.

        Args:
            state: what ``state_dict`` was.
            remedy: what the error advises.

        Raises:
            UserError: as ``load_state_dict``.
        """
        position_to_resume_at(
            self._make_plan(),
            self.tables.of("train_shards").shard_lines,
            state,
            accept_changed_data=self.position.accept_changed_data,
            remedy=remedy,
        )

    def prepare_data(self) -> None:
        """Index the shards, on the first rank of each node; the others read the side-cars."""
        runs = None if self.trainer is None else self.trainer.state.fn
        stage = "fit" if runs is None else runs.value
        for name in self.tables.settings_of(stage):
            self.tables.of(name)

    def setup(self, stage: str) -> None:
        """Build what a stage needs; during ``fit``, start counting.

        Raises:
            UserError: if shards or ``inputs`` are missing, ranks were started differently or see
                different data, or the trainer accumulates gradients.
        """
        # Lightning sets up the data first, and what follows runs collectives.
        check_ranks_started_alike(self.start_facts)
        if self.inputs is None:
            raise UserError("inputs (null) must be the preprocessing of the model")
        for name in self.tables.settings_of(stage):
            check_ranks_agree(self.tables.of(name), name=name, device=self._device())
        if stage == "fit":
            check_divisible(self.global_batch_size, self._world().world_size)
            self.bad_samples.name_from(self.bad_sample_log)
            transform = training_transform(
                self.inputs, self.train_crop_scale, scaled_decode=self.scaled_decode
            )
            self._open_features()
            replay = CropResize(self.inputs, self.scaled_decode)
            self.train_dataset = self.dataset_of(
                "train_shards",
                transform,
                features=self.features,
                teacher_features=self.teacher_features,
                reinforced=self._reinforced(replay),
                views=None
                if self.inputs.views is None
                else ViewTransform(self.inputs.views, self.inputs, self.scaled_decode),
            )
            if self.trainer is not None:
                refuse_accumulation(self.trainer)
                count_first(self.trainer, self)
                if self.val_shards is None:
                    self.trainer.limit_val_batches = 0  # an empty loader would warn
            self.position.begin(self._make_plan(), self.tables.of("train_shards"))
        if "val_shards" in self.tables.settings_of(stage):
            transform = evaluation_transform(self.inputs)
            self.val_dataset = self.dataset_of("val_shards", transform, is_evaluation=True)

    def dataset_of(self, name: str, transform: ImageTransform, **options: Any) -> PairDataset:
        """Build the data set of ``train_shards`` or ``val_shards`` as the settings say."""
        return PairDataset(
            self.tables.of(name),
            transform,
            seed=self.seed,
            pictures=self.pictures,
            captions=self.captions,
            stages=self.stages,
            source_ranges=self.tables.source_ranges() if name == "train_shards" else (),
            bad_sample_log=self.bad_sample_log,
            tokenizer=None if self.inputs is None else self.inputs.tokenizer,
            picture_id=self.picture_id,
            regions=self.regions,
            **options,
        )

    def train_dataloader(self) -> DataLoader[PairSample]:
        """Endless loader of this rank's slice of every global batch, from where training stands."""
        if self.train_dataset is None or self.plan is None:
            raise RuntimeError("call setup('fit') before train_dataloader()")
        world = self._world()
        sampler = GlobalBatchSampler(
            self.plan,
            rank=world.rank,
            world_size=world.world_size,
            progress=self.progress,
            repeat=batches_to_repeat(self.trainer),
        )
        if world.is_first:
            _LOGGER.info("%s", self.plan.describe(world.world_size, self.progress))
        if self.trainer is not None and self.trainer.local_rank == 0:
            self._prefetcher = start_prefetching(self.cache, self.position, self._prefetcher)
        batches = GlobalBatchSampler(self.plan, rank=0, world_size=1, progress=self.progress)
        if self.captions.fields or self.captions.negatives:
            check_captions(self.train_dataset, batches, is_told=world.is_first)
        if self.regions.json_field is not None:
            check_regions(self.train_dataset, batches, self.regions.json_field)
        return self._loader(self.train_dataset, sampler)

    def val_dataloader(self) -> DataLoader[PairSample] | list[DataLoader[PairSample]]:
        """Loader of this rank's part of the evaluation pairs; none without ``val_shards``."""
        if self.val_dataset is None:
            return []
        world = self._world()
        sampler = EvaluationBatchSampler(
            len(self.val_dataset),
            rank=world.rank,
            world_size=world.world_size,
            local_batch_size=self.val_local_batch_size,
        )
        return self._loader(self.val_dataset, sampler)

    def teardown(self, stage: str) -> None:
        """Stop fetching ahead."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed, and what makes that number mean the same thing later."""
        return self.position.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written.

        Raises:
            UserError: if data, seed, global batch or block size are not what they were (data may
                be, with ``accept_changed_data``).
        """
        self.position.restore(state_dict)

    def epochs(self) -> dict[str, float]:
        """Say how many epochs of the training data, or of each source of a mixture, are done."""
        return self.position.epochs()

    def advance(self) -> None:
        """Count one trained global batch."""
        self.progress.samples_consumed += self.global_batch_size
        self.bad_samples.finish_step(self.global_batch_size, self._device())

    def _make_plan(self) -> BatchPlan:
        plan = self.tables.plan(
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            block_shards=self.block_shards,
        )
        return replace(plan, lengths=self.lengths)

    def _open_features(self) -> None:
        """Open stored features of the model and of its teachers, if that has not happened yet."""
        table = self.tables.of("train_shards")
        options: Any = {
            "captions": self.captions,
            "stages": self.stages,
            "train_crop_scale": self.train_crop_scale,
        }
        if self.features is None:
            self.features = load_features(self.train_features, table, **options)
        if self.inputs is not None and not self.teacher_features:
            teachers = self.inputs.teachers
            self.teacher_features = load_teacher_features(teachers, table, **options)

    def _reinforced(self, crop_resize: CropResize | None = None) -> ReinforcedSamples | None:
        """Look at what the training shards hold of teachers; with a crop, to draw from it."""
        if self.datacompdr is None:
            return None
        return ReinforcedSamples(
            self.datacompdr,
            self.tables.of("train_shards"),
            None if crop_resize is None else Replay(crop_resize, self.datacompdr.picture_size),
            max_incomplete=self.max_incomplete,
        )
