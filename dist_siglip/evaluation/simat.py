"""SIMAT: embedding arithmetic that changes one thing in a picture and keeps the rest.

A query is a picture and two words: a cat sits on the grass, "cat" is to become "dog". The
difference of the words' embeddings is added to the picture's, and the nearest other picture is the
answer. Whether it fits "a dog sits on the grass" was judged by a network, OSCAR, whose judgements
are part of the data.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import MAX_IMAGE_PIXELS, PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.evaluation.arithmetic import check_strength, nearest_other_picture
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.encoding import encode_pictures, encode_texts
from dist_siglip.metrics.checks import raise_together
from dist_siglip.system.regular_file import check_regular, open_text, read_regular

_RIGHT_FROM = 0.5  # of OSCAR's similarity, exclusive


class _Query(NamedTuple):
    """One line of transfos.csv.

    Attributes:
        picture: position of the picture in the gallery.
        source: word that describes it.
        target: word that is to describe the answer.
        triplet: column of the judgements.
        weight: 1 / sqrt(norm2): words that are asked often count less.
    """

    picture: int
    source: str
    target: str
    triplet: int
    weight: float


class Simat(Benchmark):
    """SIMAT's score, in percent, as its authors compute it.

    With unit embeddings x of pictures and w of words,

        point = x(picture) + strength * (w(target) - w(source))
        simat_score = 100 * sum_queries weight * [judgement(answer, target) > 0.5] / sum weight

    where the answer is the picture with the largest inner product with the point, the query's own
    left out.

    Args:
        folder: ``simat_db`` of facebookresearch/SIMAT, prepared: triplets.csv and transfos.csv,
            images/ (made from Visual Genome by its prepare_dataset.py; files are called
            <region_id>.jpg, in any subfolder), and oscar_similarity_matrix.pt.
        name: of this benchmark.
        split: "dev" or "test" queries; published numbers of fine-tuned models are of "dev".
        strength: factor of the difference.

    Source:
        Couairon et al. 2022, arXiv:2112.03162; facebookresearch/SIMAT, eval.py.
    """

    task = "simat"

    def __init__(
        self,
        folder: str,
        name: str = "simat",
        split: Literal["dev", "test"] = "dev",
        strength: float = 1.0,
    ) -> None:
        super().__init__(name)
        self._folder = Path(folder)
        self._split = split
        self._strength = strength

    def check(self) -> None:
        """Find what is wrong with settings and files.

        Raises:
            UserError: naming it.
        """
        super().check()
        check_strength(self._strength, self.name)
        if self._split not in ("dev", "test"):
            raise UserError(f"split ({self._split}) of benchmark {self.name!r} must be dev or test")
        regions = self._read_regions()
        self._find_pictures(regions)
        self._read_judgements(self._read_queries(regions), len(regions))

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Answer every query; see the base class for the contract.

        Raises:
            UserError: on every rank: a picture cannot be decoded, or features are not finite.
        """
        regions = self._read_regions()
        queries = self._read_queries(regions)
        judgements = self._read_judgements(queries, len(regions))
        policy = model.inputs.pictures.changed(max_image_pixels=MAX_IMAGE_PIXELS)
        pictures = _Pictures(self._find_pictures(regions), policy)
        images = encode_pictures(model, pictures, group=group)
        raise_together(pictures.problem, device=images.device, group=group)
        words = sorted({word for query in queries for word in (query.source, query.target)})
        rows = {word: row for row, word in enumerate(words)}
        features = encode_texts(model, words, group=group)
        asked = torch.tensor([query.picture for query in queries], device=images.device)
        sources = torch.tensor([rows[query.source] for query in queries], device=images.device)
        targets = torch.tensor([rows[query.target] for query in queries], device=images.device)
        points = images[asked] + self._strength * (features[targets] - features[sources])
        answers = nearest_other_picture(points, images, asked, group=group).cpu()
        triplets = torch.tensor([query.triplet for query in queries])
        weights = torch.tensor([query.weight for query in queries], dtype=torch.float64)
        right = judgements[answers, triplets] > _RIGHT_FROM
        return BenchmarkResult(
            {"simat_score": 100 * float(weights[right].sum() / weights.sum())},
            {
                "queries": len(queries),
                "pictures": len(images),
                "split": self._split,
                "strength": self._strength,
            },
        )

    def _read_regions(self) -> list[str]:
        """Region ids in the order of the gallery."""
        rows = self._read_table("triplets.csv", ("region_id", "dataset_id"))
        try:
            regions = {int(row["dataset_id"]): row["region_id"] for row in rows}
        except ValueError as error:
            raise UserError(f"{self._folder / 'triplets.csv'} is damaged: {error}") from error
        if sorted(regions) != list(range(len(rows))):
            raise UserError(
                f"{self._folder / 'triplets.csv'} must hold every dataset_id from 0 to "
                f"{len(rows) - 1} once"
            )
        return [regions[position] for position in range(len(rows))]

    def _read_queries(self, regions: Sequence[str]) -> list[_Query]:
        columns = ("region_id", "value", "target", "target_ids", "norm2", "is_test")
        rows = self._read_table("transfos.csv", columns)
        # By region: the dataset_id of transfos.csv numbers an older gallery.
        positions = {region: position for position, region in enumerate(regions)}
        wanted = str(self._split == "test")
        try:
            queries = [
                _Query(
                    positions[row["region_id"]],
                    row["value"],
                    row["target"],
                    int(row["target_ids"]),
                    float(row["norm2"]) ** -0.5,
                )
                for row in rows
                if row["is_test"] == wanted
            ]
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"{self._folder / 'transfos.csv'} is damaged: {error}") from error
        if not queries:
            raise UserError(f"{self._folder / 'transfos.csv'} has no query of split {self._split}")
        return queries

    def _read_table(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        path = self._folder / name
        try:
            with open_text(path, newline="") as file:
                reader = csv.DictReader(file)
                missing = sorted({*columns} - {*(reader.fieldnames or ())})
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"folder ({self._folder}) of benchmark {self.name!r} has no readable {name}; give "
                "simat_db of facebookresearch/SIMAT"
            ) from error
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; take the newest of SIMAT")
        return rows

    def _read_judgements(self, queries: Sequence[_Query], num_pictures: int) -> Tensor:
        """(pictures, triplets) similarities; nothing in the file is executed."""
        path = self._folder / "oscar_similarity_matrix.pt"
        try:
            check_regular(path)
            judgements = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(
                f"folder ({self._folder}) of benchmark {self.name!r} has no {path.name}; it is "
                "part of SIMAT"
            ) from error
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(f"{path} is no tensor that can be read safely") from error
        columns = 1 + max(query.triplet for query in queries)
        shape = tuple(judgements.shape) if isinstance(judgements, Tensor) else ()
        if len(shape) != 2 or shape[0] != num_pictures or shape[1] < columns:
            raise UserError(
                f"{path} must be a matrix of {num_pictures} rows (triplets.csv) and at least "
                f"{columns} columns (transfos.csv), and is {shape}; take all files of one version"
            )
        return judgements

    def _find_pictures(self, regions: Sequence[str]) -> list[Path]:
        """Files in the order of the gallery."""
        found = {path.stem: path for path in (self._folder / "images").rglob("*.jpg")}
        missing = [region for region in regions if region not in found]
        if missing:
            raise UserError(
                f"{self._folder / 'images'} lacks {len(missing)} of {len(regions)} pictures, first "
                f"{missing[0]}.jpg; make them by prepare_dataset.py of SIMAT"
            )
        return [found[region] for region in regions]


class _Pictures(Sequence[EncodedPicture | Image.Image]):
    """Pictures that are read when they are asked for.

    One that cannot be used leaves a grey one in its place and the reason in ``problem``, so that
    this rank does not stop while the others wait for it.
    """

    def __init__(self, paths: Sequence[Path], policy: PicturePolicy) -> None:
        self._paths = paths
        self._policy = policy
        self.problem: str | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: Any) -> Any:
        path = self._paths[position]
        try:
            return EncodedPicture(read_regular(path), self._policy).decode()
        except (OSError, BadSampleError) as error:
            self.problem = f"{path} cannot be used: {error}; make it again"
            return Image.new("RGB", (64, 64), "grey")
