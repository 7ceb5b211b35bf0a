"""Embedding arithmetic: the picture nearest to a point; and its benchmark on handwritten numbers.

"Change the last digit to seven": take the picture of 4712, add what texts say is the difference
between a number that ends in seven and one that ends in two, and look among all pictures for the
nearest one. Only a picture of 4717 is right: the other digits must stay.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.handwriting import number_from_words, number_in_words, number_range
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.encoding import encode_texts, rank_and_size
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors


def check_strength(strength: float, name: str) -> None:
    """Refuse a factor of the added difference that leads nowhere.

    Args:
        strength: the factor.
        name: of the benchmark.

    Raises:
        UserError: if it is not above 0.
    """
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
    the points and a part of the pictures. One trip without gradient and a few small gathers.

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
    mine, keys = _own_part(len(points), group), _own_part(len(image_features), group)
    near = nearest_neighbors(
        points[mine],
        image_features[keys],
        1,
        query_ids=starts[mine],
        key_ids=torch.arange(len(image_features), device=image_features.device)[keys],
        group=group,
    )
    return gather_rows(near.positions[:, 0], group)


def _own_part(count: int, group: ProcessGroup | None) -> slice:
    rank, world_size = rank_and_size(group)
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


# Last digits that are a word of their own: not 0, and none after a ten, as in "twelve".
_DIGITS = tuple(range(1, 10))
_TEMPLATE_STEMS = 24  # numbers without their last digit whose texts give a difference


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
        """Find what is wrong with settings and shards.

        Raises:
            UserError: naming it.
        """
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
