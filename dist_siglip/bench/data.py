"""``bench data``: our loader beside the webdataset pipeline of open_clip, on the same shards.

With ``--parquet true`` also from Parquet files of the same samples, beside the ``datasets`` library
where it is installed.

Loaders take turns within every round, so that a busy machine is busy for all of them; what is
reported is the median round. All end with the same: float32 pictures, normalised, and token rows,
in the process that would train. Ours normalise there, which is counted, in one thread: more would
take the cores of the loader processes. Ours runs decoding as needed, and decoding exactly.

The pictures are smooth shapes with the noise of a camera, as JPEGs of quality 90: about as many
bytes per pixel, and so as much work for a decoder, as scaled-down photographs have.
"""

import io
import json as json_text
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.parquet.footer import packages
from dist_siglip.data.samples.batch import ImageNormalizer, PairCollator
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.loader import build_loader
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.transforms import Preprocessing, training_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError

PICTURE_SIZES = ((256, 320), (512, 640), (1024, 1280))
_GRAIN = 16  # pixels between two random colours
_NOISE = 5.0  # standard deviation, of 255
_GROUP_ROWS = 100  # rows of a row group, as data sets of pictures on the hub have them


def write_photo_shards(
    folder: Path,
    size: tuple[int, int],
    count: int,
    num_shards: int,
    *,
    record: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write shards of photo-like JPEGs with captions.

    Args:
        folder: made if missing.
        size: (width, height) in pixels.
        count: pictures over all shards.
        num_shards: shards of about equal size.
        record: the .json of every sample; None for none.

    Returns:
        The paths.
    """
    more = {} if record is None else {"json": json_text.dumps(record).encode()}
    os.environ["WDS_SECURE"] = "1"  # read once, at webdataset's first import
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for number, ids in enumerate(np.array_split(np.arange(count), num_shards)):
        path = str(folder / f"{number:05d}.tar")
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in ids.tolist():
                writer.write(
                    {
                        "__key__": f"{sample:06d}",
                        "jpg": _photo(generator, size),
                        "txt": f"a photo of subject number {sample}".encode(),
                        **more,
                    }
                )
        paths.append(path)
    return paths


def _photo(generator: np.random.Generator, size: tuple[int, int]) -> bytes:
    width, height = size
    shape = (height // _GRAIN + 2, width // _GRAIN + 2, 3)
    colours = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
    smooth = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = generator.standard_normal(smooth.shape, dtype=np.float32) * _NOISE
    buffer = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


OPEN_CLIP = "open_clip"
_SCALED, _EXACT = "ours", "ours, exact pixels"
BASELINES = (OPEN_CLIP, _SCALED, _EXACT)
# As datasets 4 and later write pictures, and as earlier ones and pyarrow by itself do.
_PARQUET, _SNAPPY = "ours, Parquet", "ours, Parquet in snappy"
_DATASETS = "datasets, Parquet"

_SHUFFLED = 100  # samples in open_clip's buffer; full before it begins, as in a long run


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """What all baselines are given.

    Args:
        shards: local shards with .jpg and .txt.
        image_size: side of the crops, in pixels.
        crop_scale: share of the area that a crop keeps.
        local_batch_size: pairs of a batch.
        workers: loader processes; 0 loads in this one.
        parquet: Parquet files of the same samples, by baseline.
    """

    shards: tuple[str, ...]
    image_size: int
    crop_scale: tuple[float, float]
    local_batch_size: int
    workers: int
    parquet: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def write_parquet_copies(shards: Sequence[str], folder: Path) -> dict[str, tuple[str, ...]]:
    """Write the pairs of tars as Parquet files, one for each, in both ways of ``datasets``.

    Returns:
        The files, by baseline; those of ``datasets`` if it is installed.
    """
    pyarrow, parquet = packages()
    table, reader = build_pair_table(shards, image_extensions=PICTURE_EXTENSIONS), ShardReader()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    found: dict[str, tuple[str, ...]] = {}
    for baseline, compression in ((_PARQUET, "none"), (_SNAPPY, "snappy")):
        paths = []
        (folder / compression).mkdir(parents=True, exist_ok=True)
        for number in range(len(table.shards)):
            ids = range(int(table.starts[number]), int(table.starts[number + 1]))
            pictures = [{"bytes": reader.read(table.image_span(i)), "path": None} for i in ids]
            captions = [reader.read(table.caption_spans(i)[0][1]).decode() for i in ids]
            rows = pyarrow.table({"image": pyarrow.array(pictures, kind), "caption": captions})
            paths.append(str(folder / compression / f"{number:05d}.parquet"))
            parquet.write_table(
                rows,
                paths[-1],
                row_group_size=_GROUP_ROWS,
                compression={"image.bytes": compression, "caption": "snappy"},
                use_dictionary=["caption"] if compression == "none" else True,
            )
        found[baseline] = tuple(paths)
    if find_spec("datasets") is not None:
        found[_DATASETS] = found[_PARQUET]
    reader.close()
    return found


def batches(baseline: str, streaming: Streaming) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stream (B, 3, H, W) float32 pictures, normalised, and (B, L) token rows, without end.

    Args:
        baseline: one of ``BASELINES``, or of ``streaming.parquet``.
        streaming: what to read.
    """
    if baseline == OPEN_CLIP:
        yield from _open_clip(streaming)
    elif baseline == _DATASETS:
        yield from _datasets(streaming)
    else:
        shards = streaming.parquet.get(baseline, streaming.shards)
        yield from _ours(replace(streaming, shards=shards), scaled_decode=baseline != _EXACT)


def _ours(
    streaming: Streaming, *, scaled_decode: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    settings = PreprocessCfg(size=streaming.image_size)
    inputs = Preprocessing(
        image_size=streaming.image_size,
        mean=_triple(settings.mean),
        std=_triple(settings.std),
        interpolation=settings.interpolation,
        resize_mode=settings.resize_mode,
        context_length=77,
        tokenizer=SimpleTokenizer(),
    )
    table = build_pair_table(streaming.shards, image_extensions=("jpg",))
    transform = training_transform(inputs, streaming.crop_scale, scaled_decode=scaled_decode)
    plan = BatchPlan(
        counts=table.counts,
        fingerprint=table.fingerprint,
        seed=0,
        global_batch_size=streaming.local_batch_size,
        block_shards=16,
    )
    loader = build_loader(
        PairDataset(table, transform, seed=0, pictures=PicturePolicy()),
        GlobalBatchSampler(plan, rank=0, world_size=1, progress=Progress()),
        PairCollator(inputs.tokenizer),
        workers_per_rank=streaming.workers,
        prefetch_factor=2,
        pin_memory=False,
    )
    normalize = ImageNormalizer(inputs.mean, inputs.std)
    for batch in loader:
        yield normalize.pixels(batch.images), batch.texts


def _open_clip(streaming: Streaming) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stream through the stages of open_clip 3.3's ``get_wds_dataset``, resampled variant."""
    os.environ["WDS_SECURE"] = "1"  # read once, at webdataset's first import
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    preprocess = image_transform_v2(
        PreprocessCfg(size=streaming.image_size),
        is_train=True,
        aug_cfg=AugmentationCfg(scale=streaming.crop_scale),
    )
    tokenizer = SimpleTokenizer()
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(list(streaming.shards)),
        _open_local,  # the three stages of tarfile_to_samples, which opens no local file securely
        tar_file_expander,
        group_by_keys,
        webdataset.shuffle(bufsize=_SHUFFLED, initial=_SHUFFLED),
        webdataset.select(_is_whole),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(streaming.local_batch_size, partial=False),
    )
    loader: DataLoader[Any] = DataLoader(
        pipeline,
        batch_size=None,
        shuffle=False,
        num_workers=streaming.workers,
        persistent_workers=streaming.workers > 0,
    )
    yield from loader


def _datasets(streaming: Streaming) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stream through ``datasets``, with the transform and the tokenizer of open_clip's pipeline."""
    from datasets import Features, Value, load_dataset
    from datasets import Image as ImageFeature

    preprocess = image_transform_v2(
        PreprocessCfg(size=streaming.image_size),
        is_train=True,
        aug_cfg=AugmentationCfg(scale=streaming.crop_scale),
    )
    tokenizer = SimpleTokenizer()

    def join(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        pixels = [preprocess(row["image"].convert("RGB")) for row in rows]
        return torch.stack(pixels), tokenizer([row["caption"] for row in rows])

    stream = load_dataset(
        "parquet",
        data_files=list(streaming.parquet[_DATASETS]),
        split="train",
        streaming=True,
        features=Features({"image": ImageFeature(), "caption": Value("string")}),
    )
    loader: DataLoader[Any] = DataLoader(
        stream.shuffle(seed=0, buffer_size=_SHUFFLED).repeat(None),
        batch_size=streaming.local_batch_size,
        collate_fn=join,
        drop_last=True,
        num_workers=streaming.workers,
    )
    yield from loader


def _open_local(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with open(shard["url"], "rb") as stream:
            yield {**shard, "stream": stream}


def _is_whole(sample: dict[str, Any]) -> bool:
    return "txt" in sample and any(kind in sample for kind in PICTURE_EXTENSIONS)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def data(
    shards: str | list[str] | None = None,
    image_size: int = 224,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    local_batch_size: int = 32,
    workers: Sequence[int] = (1, 2),
    rounds: int = 3,
    seconds: float = 2.0,
    pictures: int = 384,
    ranks: int = 8,
    workers_per_rank: int = 8,
    parquet: bool = False,
    json: bool = False,
) -> int:
    """Count images/s of our training loader beside those of open_clip's pipeline.

    Args:
        shards: local webdataset shards with .jpg and .txt, at least one for each loader process.
            Null writes some with photo-like JPEGs of 256 x 320, 512 x 640 and 1024 x 1280 pixels.
        image_size: side of the crops, in pixels.
        crop_scale: share of the area that a crop keeps, (least, most).
        local_batch_size: pairs of a batch.
        workers: numbers of loader processes, one thread each. With 0 the pictures are loaded here,
            and a second is one of processor time: that of a busy machine says as much.
        rounds: how often each baseline is timed; the median counts.
        seconds: how long each time, after a warm-up.
        pictures: of each size that are written.
        ranks: of the node that a row on paper is about: our images/s of one loader process, times
            all of them, each with a core of its own.
        workers_per_rank: loader processes of each of these ranks.
        parquet: read Parquet files of the same samples, too, and let the datasets library read
            them, if it is installed.
        json: print JSON instead of a table.
    """
    for name, value in (
        ("image_size", image_size),
        ("local_batch_size", local_batch_size),
        ("rounds", rounds),
        ("ranks", ranks),
        ("workers_per_rank", workers_per_rank),
    ):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    if min(workers, default=-1) < 0:
        raise UserError(f"workers ({list(workers)}) must be one number or more, each at least 0")
    if seconds <= 0:
        raise UserError(f"seconds ({seconds}) must be above 0")
    if pictures < 2 * local_batch_size:
        raise UserError(f"pictures ({pictures}) must be at least two batches")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        for name, paths in _cases(shards, Path(folder), pictures, max(workers)):
            copies = write_parquet_copies(paths, Path(folder) / "copies" / name) if parquet else {}
            for number in workers:
                streaming = Streaming(
                    shards=tuple(paths),
                    image_size=image_size,
                    crop_scale=crop_scale,
                    local_batch_size=local_batch_size,
                    workers=number,
                    parquet=copies,
                )
                rows += _measure(name, streaming, rounds, seconds)
            rows.append(_on_paper(rows, name, ranks, workers_per_rank))
    if json:
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
        return 0
    Console().print(_table(rows, rounds, seconds))
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread of this process inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cases(
    shards: str | list[str] | None, folder: Path, pictures: int, workers: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield the shards to read, by a name for the table."""
    if shards is not None:
        paths = expand_shards(shards, allow_remote=False)
        if len(paths) < workers:
            raise UserError(
                f"shards ({len(paths)}) must be at least one for each of {workers} loader processes"
            )
        yield "yours", paths
        return
    for width, height in PICTURE_SIZES:
        name = f"{width} x {height}"
        yield name, write_photo_shards(folder / name, (width, height), pictures, max(4, workers))


def _measure(name: str, streaming: Streaming, rounds: int, seconds: float) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {name: [] for name in (*BASELINES, *streaming.parquet)}
    for _ in range(rounds):
        for baseline in rates:
            rates[baseline].append(_images_per_second(baseline, streaming, seconds))
    theirs = median(rates[OPEN_CLIP])
    return [
        {
            "pictures": name,
            "workers": streaming.workers,
            "contestant": baseline,
            "images_per_second": median(found),
            "least": min(found),
            "most": max(found),
            "ratio": median(found) / theirs,
        }
        for baseline, found in rates.items()
    ]


def _on_paper(rows: list[dict[str, Any]], name: str, ranks: int, of_rank: int) -> dict[str, Any]:
    """Multiply what one of our loader processes did beside fewest others."""
    ours = [row for row in rows if (row["pictures"], row["contestant"]) == (name, _SCALED)]
    row = min(ours, key=lambda row: row["workers"])
    times = ranks * of_rank / max(1, row["workers"])
    return {
        **row,
        "workers": ranks * of_rank,
        "contestant": f"{_SCALED}, {ranks} ranks on paper",
        **{rate: row[rate] * times for rate in ("images_per_second", "least", "most")},
    }


def _images_per_second(baseline: str, streaming: Streaming, seconds: float) -> float:
    """Read batches for a while; what loader processes had ready at the start does not count."""
    stream = batches(baseline, streaming)
    for _ in range(2 + 2 * streaming.workers):
        next(stream)
    clock = time.perf_counter if streaming.workers else time.process_time
    count, start = 0, clock()
    while (elapsed := clock() - start) < seconds or not count:
        images, _ = next(stream)
        count += len(images)
    stream.close()
    return count / elapsed


def _table(rows: list[dict[str, Any]], rounds: int, seconds: float) -> Table:
    table = Table(
        title="images/s of training loaders, one thread per process",
        caption=f"medians of {rounds} interleaved rounds of {seconds:g} s; ratio over open_clip's "
        "pipeline in the same run; 0 workers: seconds of the processor; on paper: one process "
        "times all, a core each",
    )
    for heading in ("pictures", "workers", "loader", "images/s", "least", "most", "ratio"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    for row in rows:
        table.add_row(
            row["pictures"],
            str(row["workers"]),
            row["contestant"],
            f"{row['images_per_second']:,.0f}",
            f"{row['least']:,.0f}",
            f"{row['most']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    return table
