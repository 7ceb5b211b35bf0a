"""``embed``: shards in, a folder of embeddings out."""

import json as json_text
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from dist_siglip.cli.data.overview import read_table
from dist_siglip.cli.parser import CommandParser, call, parser_of_function
from dist_siglip.cli.table import print_path
from dist_siglip.data.index.damage import MAX_BAD_FRACTION, OnDamage
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    AUTO,
    EXTENSIONS_OF,
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    ExifOrientation,
    PictureFormat,
    TruncatedPictures,
    with_formats,
)
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.nearest_index import IndexKind, measured_name, read_metrics
from dist_siglip.evaluation.embed.rotation import PCA
from dist_siglip.evaluation.embed.shard_job import Format
from dist_siglip.evaluation.encoding import Precision, RowType, Towers
from dist_siglip.models.weight_source import LOCAL_DIR
from dist_siglip.training.module.trained import load_trained


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``embed`` and run it."""
    return call(embed, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``embed``."""
    return parser_of_function(command, embed)


def embed(
    shards: str | list[str],
    *,
    out: str,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    weights_average: bool | None = None,
    towers: Towers = "both",
    format: Format = "clip-retrieval",  # noqa: A002 - the name of the option
    dtype: RowType = "float16",
    precision: Precision = "32-true",
    device: str = "auto",
    local_batch_size: int = 256,
    workers: int = 2,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    transparency: str = AUTO,
    exif_orientation: ExifOrientation | Literal["auto"] = AUTO,
    truncated_pictures: TruncatedPictures | Literal["auto"] = AUTO,
    formats: tuple[PictureFormat, ...] | Literal["auto"] = AUTO,
    intensity_window: tuple[float, float] | Literal["auto"] | None = AUTO,
    on_damage: OnDamage = "refuse",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    dim: int | None = None,
    rotate: str | None = None,
    index: Literal["faiss"] | None = None,
    index_kind: IndexKind = "auto",
    num_patches: int | None = None,
    tokens: bool = False,
    json: bool = False,
) -> int:
    """Write an embedding for every picture and caption; called again, go on where it stopped.

    Name a run or a model. Every sample has a row of length 1; samples that cannot be used are left
    out and listed in left_out/. Started by torchrun or srun, each process takes its share of the
    shards and reports on that.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        out: folder of the embeddings.
        run_dir: folder of a run, whose newest checkpoint is taken; or give a model.
        ckpt_path: another checkpoint of that run.
        model: open_clip name, JSON config, local-dir:PATH or hf-hub:ORG/REPO.
        pretrained: open_clip tag of the model, or a file of weights.
        weights_average: true takes the average that a checkpoint holds, false the weights it was
            made of; null the average of a run, of other weights what they put first.
        towers: "both", or only "image" or "text"; with "text" no picture is decoded.
        format: "clip-retrieval" writes img_emb/, text_emb/ and metadata/, files for each shard;
            "parquet" one embeddings.parquet with a list of numbers for each tower; "features" a
            file for each shard that training reads in place of a locked tower
            (data.train_features; with dtype float32 as exact as the tower itself).
        dtype: of the embeddings in the files. "int8" takes a byte for each column, "binary" a bit,
            calibrated on the first 16,384 samples; the numbers are kept as
            quantization.safetensors, what of the exact neighbours is found as metrics.json.
        precision: of the computation.
        device: "auto" takes this process's GPU, or the CPU; or cpu, cuda, cuda:1, ...
        local_batch_size: samples of a batch on each process.
        workers: loader processes of each process; 0 loads in the process itself.
        captions: where captions are; of several the first is taken.
        image_extensions: members that are the picture of a sample, in order of preference.
        max_image_pixels: pictures with more pixels are left out.
        transparency: colour that transparent pictures are laid on, "#rrggbb" or a name; or drop:
            their alpha is left out. auto: as the run trained, or the folder of the model says,
            else white.
        exif_orientation: ignore what a camera says of up and down, or apply it. auto: as above,
            else ignore.
        truncated_pictures: JPEGs and PNGs that end too early are left out ("replace"), or used as
            far as they go ("use"). auto: as the run trained, else left out.
        formats: of pictures that are decoded, see data.formats of a run. auto: as the run trained,
            else jpeg, png, webp.
        intensity_window: values of grey pictures of more than 8 bits that are black and white,
            [low, high]; null: 0 and 65535. auto: as the run trained, else null.
        on_damage: "refuse" damaged shards and incomplete samples, or "skip" them.
        max_bad_fraction: share of shards and samples that may be skipped or left out.
        cache: copies of remote shards.
        dim: first columns of the embeddings that are kept, of length 1 again; null keeps all.
        rotate: "pca" turns both sides so that the first columns hold most of the pictures: fitted
            to the first 16,384 pictures of the shards and kept as rotation.safetensors in the
            folder; or such a file, so that other shards, or queries, are turned alike. Null: none.
        index: "faiss" also builds an index of the image rows for search, and measures what it finds
            of the exact neighbours; of a finished folder nothing else is done. Null builds none.
        index_kind: "flat" looks at all rows, "hnsw" follows a graph, "ivf_pq" looks at some cells
            of rows of D/4 bytes, "bits" at a bit for each column; "auto" is flat below 20,000 rows,
            hnsw below 2,000,000.
        num_patches: most patches of a picture, for towers of pictures of any shape (NaFlex). Null
            is as the run or the model says.
        tokens: true writes the patch tokens behind the last norm of the image tower, too, as
            (rows, patches, width) in token_emb/, with format clip-retrieval.
        json: print JSON instead of a table.
    """
    settings = EmbedSettings(
        towers=towers,
        format=format,
        dtype=dtype,
        precision=precision,
        device=device,
        local_batch_size=local_batch_size,
        workers=workers,
        captions=captions,
        max_image_pixels=max_image_pixels,
        transparency=transparency,
        exif_orientation=exif_orientation,
        truncated_pictures=truncated_pictures,
        formats=formats,
        intensity_window=intensity_window,
        max_bad_fraction=max_bad_fraction,
        dim=dim,
        rotate=rotate,
        index=index,
        index_kind=index_kind,
        tokens=tokens,
    )
    # Which formats the run has is known when it is loaded, after its shards.
    found = with_formats(image_extensions, EXTENSIONS_OF if formats == AUTO else formats)
    table = read_table(shards, captions, found, on_damage, max_bad_fraction, cache)
    built = load_trained(
        run_dir=run_dir,
        ckpt_path=ckpt_path,
        model=model,
        pretrained=pretrained,
        weights_average=weights_average,
        num_patches=num_patches,
    )
    if model and model.startswith(LOCAL_DIR):
        model = LOCAL_DIR + os.path.abspath(Path(model.removeprefix(LOCAL_DIR)).expanduser())
    source = {
        "image_extensions": list(found),
        "run_dir": None if run_dir is None else os.path.abspath(run_dir),
        "ckpt_path": None if ckpt_path is None else os.path.abspath(ckpt_path),
        "model": os.path.abspath(model) if model and os.path.isfile(model) else model,
        "pretrained": os.path.abspath(pretrained)
        if pretrained and os.path.exists(pretrained)
        else pretrained,
        "weights_average": weights_average,
        "num_patches": num_patches,
        "rotation": None if rotate is None or rotate == PCA else os.path.abspath(rotate),
        "pictures": asdict(settings.pictures(built.pictures)),
    }
    report = embed_shards(table, built, Path(out), settings, source=source)
    measured = read_metrics(Path(out))
    if json:
        content = {"out": out, **report._asdict(), **({"metrics": measured} if measured else {})}
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    shown = Table()
    for heading in report._fields:
        shown.add_column(heading.replace("_", " "), justify="right")
    shown.add_row(*(f"{count:,.0f}" for count in report))
    Console().print(shown)
    for name, numbers in measured.items():
        Console().print(_recall_table(name, numbers))
    print_path("embedded into", out)
    return 0


def _recall_table(name: str, numbers: Mapping[str, Any]) -> Table:
    """Lay out what quantised rows or an index find of the exact neighbours."""
    table = Table(
        title=f"{measured_name(name, numbers)}: share of the exact neighbours found",
        caption=f"{numbers['queries']:,} {numbers['query_tower']} queries, "
        f"{numbers['rows']:,} rows",
        show_header=False,
    )
    for key, value in numbers.items():
        if "recall@" in key:
            table.add_row(key.replace("_", " "), f"{value:.4f}")
    return table
