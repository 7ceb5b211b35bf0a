"""Embedding arithmetic, the picture nearest to a point: handwritten numbers, and SIMAT.

"Change the last digit to seven": take the picture of 4712, add what texts say is the difference
between a number that ends in seven and one that ends in two, and look among all pictures for the
nearest one. Only a picture of 4717 is right: the other digits must stay.

A query of SIMAT is a picture and two words: a cat sits on the grass, "cat" is to become "dog". The
difference of the words' embeddings is added to the picture's, and the nearest other picture is the
answer. Whether it fits "a dog sits on the grass" was judged by a network, OSCAR, whose judgements
are part of the data.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.handwriting import number_from_words, number_in_words, number_range
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import MAX_IMAGE_PIXELS
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.encoding import encode_pictures, encode_texts, own_part
from dist_siglip.evaluation.files.pictures import PictureFiles
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.rows import raise_together
from dist_siglip.system.regular_file import check_regular, open_text

# Last digits that are a word of their own: not 0, and none after a ten, as in "twelve".
_DIGITS = tuple(range(1, 10))
_TEMPLATE_STEMS = 24  # numbers without their last digit whose texts give a difference
_RIGHT_FROM = 0.5  # of OSCAR's similarity, exclusive


def check_strength(strength: float, name: str) -> None:
    """Refuse a factor of the added difference that leads nowhere."""
    if not strength > 0:
        raise UserError(f"strength ({strength}) of benchmark {name!r} must be above 0; use 1")


def nearest_other_picture(
    points: Tensor,
    image_features: Tensor,
    starts: Tensor,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Find the picture with the largest inner product with each point.

    Distributed contract: every rank passes the same rows and gets all answers; each takes a part of
    the points and a part of the pictures. One exchange without gradient and a few small gathers.

    Args:
        points: (Q, D), finite, of any length.
        image_features: (N, D), at least two pictures.
        starts: (Q,) int64 positions of the pictures the points come from, which are no answers.
        group: process group.

    Returns:
        (Q,) int64 positions; of equal pictures the lowest.

    Example:
        >>> pictures = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> nearest_other_picture(pictures[:2] + 1, pictures, torch.tensor([0, 1]))
        tensor([1, 2])
    """
    mine, keys = own_part(len(points), group), own_part(len(image_features), group)
    near = nearest_neighbors(
        points[mine],
        image_features[keys],
        1,
        query_ids=starts[mine],
        key_ids=torch.arange(len(image_features), device=image_features.device)[keys],
        group=group,
    )
    return gather_rows(near.positions[:, 0], group)


class _Queries(NamedTuple):
    """What is asked: a picture of ``numbers[picture]`` is to become one of ``wanted``.

    Attributes:
        pictures: (Q,) int64, positions among the pictures of all ranks.
        wanted: (Q,) int64, numbers.
    """

    pictures: Tensor
    wanted: Tensor


class HandwritingArithmetic(Benchmark):
    """Arithmetic of pictures and texts on handwritten numbers, in the manner of SIMAT.

    Every picture is asked to become every other number of the gallery that differs in the last
    digit alone, if both last digits are words of their own. The picture itself is no answer.
    Metrics, each a share of the queries whose nearest picture shows the wanted number:

    - ``caption_arithmetic@1``: the difference is that of captions with the two last digits,
      averaged over other numbers;
    - ``word_arithmetic@1``: it is that of the two words alone, "seven" and "two", as in SIMAT;
    - ``unchanged@1``: nothing is added: what lies nearest anyhow;
    - ``wanted_caption@1``: the caption of the wanted number looks for it, which no arithmetic can
      be expected to beat.

    Args:
        shards: of ``write_handwriting_shards``, or of other pictures whose captions are numbers of
            equally many digits in words.
        name: of this benchmark.
        captions: where captions are.
        strength: factor of the difference.
        loading: how the shards are read.
    """

    task = "handwriting_arithmetic"

    def __init__(
        self,
        shards: str | list[str],
        name: str = "handwriting_arithmetic",
        captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
        strength: float = 1.0,
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._strength = strength
        self._shards = BenchmarkShards(shards, captions, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings and shards."""
        super().check()
        check_strength(self._strength, self.name)
        self._shards.check()

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Ask every query of the gallery; see the base class for the contract.

        Raises:
            UserError: on every rank: captions are no numbers in words, no two numbers differ in the
                last digit alone, or too many samples cannot be used.
        """
        encoded = self._shards.encode(model, encoded_texts=0, group=group)
        order = gather_rows(encoded.sample_ids, group).argsort()
        own_numbers = torch.tensor(
            [number_from_words(texts[0]) or 0 for texts in encoded.texts],
            dtype=torch.int64,
            device=encoded.sample_ids.device,
        )
        images = gather_rows(encoded.image_features, group)[order]
        numbers = gather_rows(own_numbers, group)[order]
        num_digits = self._digits_of(numbers)
        queries = _ask(numbers)
        if not len(queries.wanted):
            raise UserError(
                f"shards of benchmark {self.name!r} hold no two numbers that differ in the last "
                "digit alone; give more pictures"
            )
        words = encode_texts(model, [number_in_words(d, 1) for d in _DIGITS], group=group)
        by_word = words[queries.wanted % 10 - 1] - words[numbers[queries.pictures] % 10 - 1]
        by_caption = _caption_differences(model, num_digits, numbers, queries, group)
        distinct, which = queries.wanted.unique(return_inverse=True)
        captions = [number_in_words(number, num_digits) for number in distinct.tolist()]
        start = images[queries.pictures]
        points = {
            "caption_arithmetic@1": start + self._strength * by_caption,
            "word_arithmetic@1": start + self._strength * by_word,
            "unchanged@1": start,
            "wanted_caption@1": encode_texts(model, captions, group=group)[which],
        }
        metrics = {}
        for metric, rows in points.items():
            found = nearest_other_picture(rows, images, queries.pictures, group=group)
            metrics[metric] = float((numbers[found] == queries.wanted).double().mean())
        details = {
            "pictures": len(numbers),
            "queries": len(queries.wanted),
            "left_out": encoded.num_bad,
            "strength": self._strength,
        }
        return BenchmarkResult(metrics, details)

    def _digits_of(self, numbers: Tensor) -> int:
        """How many digits all numbers have; refuse captions that are no numbers."""
        lengths = {len(str(number)) for number in numbers.unique().tolist()}
        if len(lengths) != 1 or (len(numbers) and int(numbers.min()) < 10):
            raise UserError(
                f"captions of benchmark {self.name!r} must be numbers of two digits or more in "
                'words, all of equally many, such as "four thousand seven hundred twelve"'
            )
        return lengths.pop()


def _ask(numbers: Tensor) -> _Queries:
    """Make every query that the gallery can answer, picture by picture."""
    askable = (numbers % 10 != 0) & (numbers // 10 % 10 != 1)
    known = numbers[askable].unique()
    pictures, wanted = [], []
    for picture in askable.nonzero()[:, 0].tolist():
        number = numbers[picture]
        others = known[(known // 10 == number // 10) & (known != number)]
        pictures += [picture] * len(others)
        wanted += others.tolist()
    device = numbers.device
    return _Queries(
        torch.tensor(pictures, dtype=torch.int64, device=device),
        torch.tensor(wanted, dtype=torch.int64, device=device),
    )


def _caption_differences(
    model: EvaluatedModel,
    num_digits: int,
    numbers: Tensor,
    queries: _Queries,
    group: ProcessGroup | None,
) -> Tensor:
    """What captions say is the difference of the last digits, from numbers of other beginnings.

    Returns:
        (Q, D): mean over beginnings b, those of the queries left out, of
        text(b, wanted last digit) - text(b, last digit of the picture).
    """
    lowest, highest = number_range(num_digits)
    stems = [stem for stem in range(lowest // 10, highest // 10) if stem % 10 != 1]
    stems = stems[:: max(1, len(stems) // _TEMPLATE_STEMS)]
    texts = [number_in_words(10 * stem + digit, num_digits) for stem in stems for digit in _DIGITS]
    features = encode_texts(model, texts, group=group).unflatten(0, (len(stems), len(_DIGITS)))
    sources, targets = numbers[queries.pictures] % 10 - 1, queries.wanted % 10 - 1
    total = features.sum(dim=0)
    difference = total[targets] - total[sources]
    known = torch.tensor(stems, device=numbers.device)
    asked = queries.wanted // 10
    place = torch.searchsorted(known, asked).clamp_max(len(stems) - 1)
    is_own = (known[place] == asked).to(features)[:, None]
    difference -= is_own * (features[place, targets] - features[place, sources])
    return difference / (len(stems) - is_own)


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
        """Find what is wrong with settings and files."""
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
        pictures = PictureFiles(self._find_pictures(regions), policy)
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
