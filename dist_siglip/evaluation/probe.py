"""What can be learned from image features: a linear probe, nearest neighbours, and few shots.

The probe is that of CLIP: scikit-learn's logistic regression on frozen features, whose
regularisation is searched on a validation split. It is fitted on the first rank to the rows of all.
"""

import logging
import math
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.distributed import copy_from_first_rank, gather_rows, sum_over_ranks
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.classification import (
    Summary,
    parse_labels,
    rank_labels,
    read_classes,
    summarise,
)
from dist_siglip.evaluation.encoding import rank_and_size
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.metrics.dense import vote_labels
from dist_siglip.metrics.rows import check_features

_LOGGER = logging.getLogger(__name__)
_MOST_VALIDATION_SHOTS = 4
_SECONDS_BETWEEN_SIGNS = 10.0  # of the first rank to the others that a fit gets on
_STEPS_PER_DECADE = 8
_DECADES = 6  # on both sides of 1
STRENGTHS = tuple(
    10 ** (step / _STEPS_PER_DECADE)
    for step in range(-_DECADES * _STEPS_PER_DECADE, _DECADES * _STEPS_PER_DECADE + 1)
)


class _Rows(NamedTuple):
    """Pictures of this rank: (B, D) features, (B,) labels, (B,) ids of samples."""

    features: Tensor
    labels: Tensor
    sample_ids: Tensor
    num_bad: int = 0

    def where(self, chosen: Tensor) -> "_Rows":
        return _Rows(self.features[chosen], self.labels[chosen], self.sample_ids[chosen])


class LinearProbe(Benchmark):
    """Linear probe and nearest neighbours of labelled pictures, with all of them or a few.

    Metrics, with CLIP_benchmark's names: ``lp_acc1``, ``lp_acc5`` (from five classes on),
    ``lp_mean_per_class_recall``; and the same of the neighbours with ``knn_``.

    The strength of regularisation is searched as CLIP does (``search_strength``), on
    ``val_shards`` or else on a part of the training split; the probe is fitted again to training
    and validation pictures together. With ``shots`` it sees those pictures of each class alone,
    and the search takes ``val_shards``, or else min(shots, 4) more of each class (CoOp).

    Args:
        train_shards: webdataset shards of pictures and labels to learn from.
        shards: those that are asked, likewise.
        val_shards: those that choose the strength. Null: a part of the training split.
        classes: as of ``Classification``, for the details alone. Null: classnames.txt beside the
            shards, else numbers.
        name: of this benchmark.
        shots: pictures of each class to learn from, drawn by ``seed``. Null: all.
        c: inverse of the strength of regularisation, scikit-learn's C. Null: searched.
        val_share: share of each class of the training split that chooses the strength, at least one
            picture if the class has two.
        neighbors: that vote on the class; 0 leaves the votes out.
        temperature: of the votes.
        seed: of what is drawn.
        max_iterations: of each fit, at most.
        label_member: extension of the member that holds the number of the class, from 0.
        loading: how the shards are read.

    Source:
        Radford et al. 2021, arXiv:2103.00020, appendix A.3; of the votes, Caron et al. 2021,
        arXiv:2104.14294; of validation shots, Zhou et al. 2022, arXiv:2109.01134.
    """

    task = "linear_probe"

    def __init__(
        self,
        train_shards: str | list[str],
        shards: str | list[str],
        val_shards: str | list[str] | None = None,
        classes: str | list[str] | None = None,
        name: str = "linear_probe",
        shots: int | None = None,
        c: float | None = None,
        val_share: float = 0.2,
        neighbors: int = 20,
        temperature: float = 0.07,
        seed: int = 0,
        max_iterations: int = 1000,
        label_member: str = "cls",
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._classes = classes
        self._shots = shots
        self._c = c
        self._val_share = val_share
        self._neighbors = neighbors
        self._temperature = temperature
        self._seed = seed
        self._max_iterations = max_iterations
        rule = CaptionRule(members=(label_member,))
        self._train = BenchmarkShards(train_shards, rule, loading, name=name)
        self._test = BenchmarkShards(shards, rule, loading, name=name)
        self._val = None
        if val_shards is not None:
            self._val = BenchmarkShards(val_shards, rule, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings, class names and shards."""
        super().check()
        of = f"benchmark {self.name}: "
        if self._shots is not None:
            check_least(1, of=of, shots=self._shots)
        check_least(0, of=of, neighbors=self._neighbors, seed=self._seed)
        check_least(1, of=of, max_iterations=self._max_iterations)
        if self._c is not None and not 0 < self._c < math.inf:
            raise UserError(f"{of}c ({self._c}) must be above 0, or null to search for it")
        if not 0 < self._val_share < 1:
            raise UserError(f"{of}val_share ({self._val_share}) must be in (0, 1)")
        if not 0 < self._temperature < math.inf:
            raise UserError(f"{of}temperature ({self._temperature}) must be above 0; try 0.07")
        for shards in self._all_shards():
            shards.check()
        if self._classes is not None:
            read_classes(self._classes, self._test.table.shards)

    def _all_shards(self) -> list[BenchmarkShards]:
        return [each for each in (self._train, self._test, self._val) if each is not None]

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Learn from the training pictures and ask the others; see the base class.

        Raises:
            UserError: on every rank: features are not finite, a label is no class, a class has
                fewer pictures than ``shots``, there are fewer than two classes to learn, or too
                many samples cannot be used.
        """
        read = [self._encode(shards, model, group) for shards in self._all_shards()]
        train, test = read[0], read[1]
        labels = gather_rows(torch.cat([rows.labels for rows in read]), group)
        classes = self._class_names(int(labels.max()) + 1 if len(labels) else 0)
        train, val, both = self._split(train, read[2] if len(read) > 2 else None, classes, group)
        c = self._c
        if c is None:
            regression = self._regression(train, classes, model, group)
            c = search_strength(lambda c: self._accuracy(regression.weights(c), val, group))
        weights = self._regression(both, classes, model, group).weights(c)
        found = {"lp": _summarise(label_scores(test.features, weights), test, classes, group)}
        if self._neighbors:
            votes = vote_labels(
                test.features,
                both.features,
                both.labels,
                len(classes),
                k=self._neighbors,
                temperature=self._temperature,
                group=group,
            )
            found["knn"] = _summarise(votes, test, classes, group)
        metrics = {
            f"{kind}_{name}": value
            for kind, summary in found.items()
            for name, value in summary.metrics.items()
        }
        details = {
            "c": c,
            "shots": self._shots,
            "seed": self._seed,
            "train_pictures": _count(both, group),
            "left_out": sum(rows.num_bad for rows in read),
            **{kind: summary.details for kind, summary in found.items()},
        }
        return BenchmarkResult(metrics, details)

    def _encode(
        self, shards: BenchmarkShards, model: EvaluatedModel, group: ProcessGroup | None
    ) -> _Rows:
        encoded = shards.encode(model, encoded_texts=0, group=group)
        check_features(
            [("image_features", encoded.image_features)],
            [("sample_ids", encoded.sample_ids)],
            unit_norm=True,
            group=group,
        )
        given = None
        if self._classes is not None:
            given = len(read_classes(self._classes, shards.table.shards))
        labels = parse_labels(encoded, given, shards, group=group)
        rows = _Rows(encoded.image_features, labels, encoded.sample_ids, encoded.num_bad)
        if not _count(rows, group):
            raise UserError(f"benchmark {self.name!r} has no picture that can be used")
        return rows

    def _class_names(self, least: int) -> list[str]:
        """Names of the classes, numbers where they have none."""
        try:
            classes = read_classes(self._classes, self._test.table.shards)
        except UserError:
            if self._classes is not None:
                raise
            classes = []
        return [*classes, *map(str, range(len(classes), least))]

    def _split(
        self,
        train: _Rows,
        val: _Rows | None,
        classes: list[str],
        group: ProcessGroup | None,
    ) -> tuple[_Rows, _Rows, _Rows]:
        """Return what the search learns from, what it asks, and what the last fit learns from."""
        places = places_in_class(train.labels, train.sample_ids, seed=self._seed, group=group)
        counts = sum_over_ranks(torch.bincount(train.labels, minlength=len(classes)), group)
        if self._shots is None:
            if val is not None:
                return train, val, _joined(train, val, self._train.table.num_samples)
            wanted = (counts.double() * self._val_share).long().clamp_min(1).minimum(counts - 1)
            held_out = places < wanted[train.labels]
            return train.where(~held_out), train.where(held_out), train
        for number, count in enumerate(counts.tolist()):
            if 0 < count < self._shots:
                raise UserError(
                    f"shots ({self._shots}) of benchmark {self.name!r} must be at most the "
                    f"pictures of each class: {classes[number]!r} has {count}; use fewer"
                )
        few = train.where(places < self._shots)
        if val is None:
            until = self._shots + min(self._shots, _MOST_VALIDATION_SHOTS)
            val = train.where((places >= self._shots) & (places < until))
        return few, val, few

    def _regression(
        self, rows: _Rows, classes: list[str], model: EvaluatedModel, group: ProcessGroup | None
    ) -> "_Regression":
        counts = sum_over_ranks(torch.bincount(rows.labels, minlength=len(classes)), group)
        if int((counts > 0).sum()) < 2:
            raise UserError(
                f"train_shards of benchmark {self.name!r} must have pictures of two classes or "
                "more to learn from; add shards"
            )
        return _Regression(
            rows, len(classes), self._max_iterations, model.note_progress, group=group
        )

    def _accuracy(self, weights: Tensor, val: _Rows, group: ProcessGroup | None) -> float:
        count = _count(val, group)
        if not count:
            raise UserError(
                f"benchmark {self.name!r} has no picture to choose c with: its training split has "
                "none to spare; give val_shards, or c"
            )
        predicted, _ = rank_labels(label_scores(val.features, weights), val.labels)
        return int(sum_over_ranks((predicted == val.labels).sum(), group)) / count


class _Regression:
    """Logistic regression of scikit-learn in float64, fitted on the first rank to all rows.

    Distributed contract: every rank passes its own rows, any number of them (0 too), which are
    gathered; of each fit a broadcast every ten seconds, so that none waits long, and one of the
    weights. Every rank gets the same numbers, whatever the number of ranks.
    """

    def __init__(
        self,
        rows: _Rows,
        num_classes: int,
        max_iterations: int,
        note_progress: Callable[[], None],
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        features, labels, ids = (gather_rows(each, group) for each in rows[:3])
        self._rows = None
        if rank_and_size(group)[0] == 0:
            order = ids.argsort()
            self._rows = features[order].double().cpu().numpy(), labels[order].cpu().numpy()
        self._shape = features.shape[1] + 1, num_classes
        self._device = features.device
        self._max_iterations = max_iterations
        self._note_progress = note_progress
        self._group = group

    def weights(self, c: float) -> Tensor:
        """Fit; return (D + 1, K) float64 of which the last row is the constants.

        A class without rows has -inf there.
        """
        found = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        is_done = torch.zeros(1, device=self._device)
        fit: Future[LogisticRegression | None] = Future()

        def work() -> None:
            try:
                fit.set_result(self._fit(c))
            except Exception as error:  # noqa: BLE001 - raised again by whoever waits
                fit.set_exception(error)

        # A daemon: whoever interrupts the run does not wait for the fit.
        Thread(target=work, daemon=True).start()
        while not is_done:
            self._note_progress()
            wait([fit], _SECONDS_BETWEEN_SIGNS if self._rows is not None else 0)
            is_done.fill_(fit.done())
            copy_from_first_rank([is_done], self._group)
        fitted = fit.result()
        if fitted is not None:
            coefficients = torch.from_numpy(fitted.coef_)
            rows = torch.cat([coefficients, torch.from_numpy(fitted.intercept_)[:, None]], 1)
            if len(rows) == 1:  # of two classes scikit-learn has the second alone
                rows = torch.cat([torch.zeros_like(rows), rows])
            found[-1] = -torch.inf
            found[:, torch.from_numpy(fitted.classes_).to(found.device)] = rows.T.to(found.device)
        copy_from_first_rank([found], self._group)
        return found

    def _fit(self, c: float) -> LogisticRegression | None:
        """Fit on the first rank; None on others."""
        if self._rows is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=c, max_iter=self._max_iterations).fit(*self._rows)
        if fitted.n_iter_.max() >= self._max_iterations:
            _LOGGER.info("linear probe: c %g takes more than %d steps", c, self._max_iterations)
        return fitted


def label_scores(features: Tensor, weights: Tensor) -> Tensor:
    """Apply the weights of a probe: (B, K) float64."""
    return torch.addmm(weights[-1], features.double(), weights[:-1])


def search_strength(accuracy_of: Callable[[float], float]) -> float:
    """Search ``STRENGTHS``, 97 steps from 1e-6 to 1e6, for the best, with some 15 looks.

    Seven of them two decades apart come first, then those one step beside the best on both sides,
    while the step is halved to an eighth of a decade: the search of CLIP. It finds the best of all
    if accuracy has one peak. Of equal ones the smallest is taken.

    Args:
        accuracy_of: of a strength, on a validation split; equal on all ranks.

    Example:
        >>> round(search_strength(lambda c: -abs(c - 0.3)), 4)
        0.3162

    Source:
        Radford et al. 2021, arXiv:2103.00020, appendix A.3.
    """
    known: dict[int, float] = {}

    def best(places: list[int]) -> int:
        for place in places:
            if place not in known and 0 <= place < len(STRENGTHS):
                known[place] = accuracy_of(STRENGTHS[place])
        return max((place for place in places if place in known), key=known.__getitem__)

    step = 2 * _STEPS_PER_DECADE
    peak = best(list(range(0, len(STRENGTHS), step)))
    while step > 1:
        step //= 2
        peak = best([peak - step, peak, peak + step])
    return STRENGTHS[peak]


def places_in_class(
    labels: Tensor, sample_ids: Tensor, *, seed: int, group: ProcessGroup | None = None
) -> Tensor:
    """Draw an order of the pictures of each class, over all ranks.

    Distributed contract: every rank passes its own rows, any number of them (0 too); one
    ``gather_rows``. The order does not depend on how rows are distributed.

    Args:
        labels: (B,) int64.
        sample_ids: (B,) int64, each once over all ranks.
        seed: of the order.
        group: process group.

    Returns:
        (B,) int64, place of each row among those of its class, from 0.

    Example:
        >>> places_in_class(torch.tensor([3, 3, 5]), torch.tensor([0, 1, 2]), seed=0).tolist()
        [1, 0, 0]
    """
    rows = gather_rows(torch.stack([labels, sample_ids], dim=1), group).cpu()
    if not len(rows):
        return torch.empty_like(labels)
    span = int(rows[:, 1].max()) + 1
    drawn = torch.randperm(span, generator=torch.Generator().manual_seed(seed))
    ordered = rows[(rows[:, 0] * span + drawn[rows[:, 1]]).argsort()]
    starts = torch.ones(len(rows), dtype=torch.bool)
    starts[1:] = ordered[1:, 0] != ordered[:-1, 0]
    numbers = torch.arange(len(rows))
    places = torch.empty(span, dtype=torch.int64)
    places[ordered[:, 1]] = numbers - numbers.where(starts, numbers.new_zeros(())).cummax(0).values
    return places.to(sample_ids.device)[sample_ids]


def _joined(first: _Rows, second: _Rows, num_samples: int) -> _Rows:
    """Rows of two tables, of which the first has so many samples; each has an id of its own."""
    return _Rows(
        torch.cat([first.features, second.features]),
        torch.cat([first.labels, second.labels]),
        torch.cat([first.sample_ids, second.sample_ids + num_samples]),
    )


def _count(rows: _Rows, group: ProcessGroup | None) -> int:
    return int(sum_over_ranks(torch.tensor(len(rows.labels), device=rows.labels.device), group))


def _summarise(
    scores: Tensor, rows: _Rows, classes: list[str], group: ProcessGroup | None
) -> Summary:
    """Count the right answers of all ranks."""
    predictions, ranks = rank_labels(scores, rows.labels)
    answers = gather_rows(torch.stack([rows.labels, predictions, ranks], dim=1), group)
    return summarise(*answers.cpu().numpy().T, classes=classes)
