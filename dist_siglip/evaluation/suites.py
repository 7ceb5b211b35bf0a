"""Suites: all the data sets of a folder as CLIP_benchmark keeps them, and the averages of tables.

A folder of a data set is called ``wds_NAME`` (CLIP_benchmark) or ``wds_NAME_test`` (DataComp), with
``-`` for the ``/`` of a name; it holds test/*.tar, maybe train/*.tar, and what says its task.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult
from dist_siglip.evaluation.classification import Classification
from dist_siglip.evaluation.probe import LinearProbe
from dist_siglip.evaluation.retrieval import Retrieval
from dist_siglip.evaluation.shards import LoadSettings
from dist_siglip.system.regular_file import read_json, read_regular

_LOGGER = logging.getLogger(__name__)
_ACC1, _RECALL, _F1 = "acc1", "mean_per_class_recall", "F1-macro_all"
_BOTH_WAYS = "mean_recall@1"
_MOST_TEXT_BYTES = 1 << 20
_MOST_DIGITS = 5  # of a number of shards
_MOST_RESULT_BYTES = 256 << 20
_DATACOMP_SUITE = "datacomp"
EVERYTHING = "all"


class DataSet(NamedTuple):
    """A data set of tables.

    Attributes:
        title: in DataComp's table.
        metric: that stands for it there.
        folders: names of its folder, without wds_ and _test, where ``-`` for ``/`` gives another.
    """

    title: str
    metric: str = _ACC1
    folders: tuple[str, ...] = ()


# Keys and titles are DataComp's, and so are the metrics.
DATA_SETS: Mapping[str, DataSet] = {
    "vtab/caltech101": DataSet("Caltech-101", _RECALL),
    "cifar10": DataSet("CIFAR-10", folders=("vtab-cifar10",)),
    "vtab/cifar100": DataSet("CIFAR-100"),
    "vtab/clevr_count_all": DataSet("CLEVR Counts"),
    "vtab/clevr_closest_object_distance": DataSet("CLEVR Distance"),
    "country211": DataSet("Country211"),
    "vtab/dtd": DataSet("Describable Textures"),
    "vtab/eurosat": DataSet("EuroSAT"),
    "fgvc_aircraft": DataSet("FGVC Aircraft", _RECALL),
    "food101": DataSet("Food-101"),
    "gtsrb": DataSet("GTSRB"),
    "imagenet1k": DataSet("ImageNet 1k"),
    "imagenet_sketch": DataSet("ImageNet Sketch"),
    "imagenetv2": DataSet("ImageNet v2"),
    "imagenet-a": DataSet("ImageNet-A"),
    "imagenet-o": DataSet("ImageNet-O"),
    "imagenet-r": DataSet("ImageNet-R"),
    "vtab/kitti_closest_vehicle_distance": DataSet("KITTI Vehicle Distance"),
    "mnist": DataSet("MNIST"),
    "objectnet": DataSet("ObjectNet"),
    "vtab/flowers": DataSet("Oxford Flowers-102", _RECALL),
    "vtab/pets": DataSet("Oxford-IIIT Pet", _RECALL),
    "voc2007": DataSet("Pascal VOC 2007"),
    "vtab/pcam": DataSet("PatchCamelyon"),
    "renderedsst2": DataSet("Rendered SST2"),
    "vtab/resisc45": DataSet("RESISC45"),
    "cars": DataSet("Stanford Cars"),
    "stl10": DataSet("STL-10"),
    "sun397": DataSet("SUN397"),
    "vtab/svhn": DataSet("SVHN"),
    "retrieval/flickr30k": DataSet("Flickr", _BOTH_WAYS, ("flickr30k",)),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": DataSet(
        "MSCOCO", _BOTH_WAYS, ("mscoco_captions",)
    ),
    "misc/winogavil": DataSet("WinoGAViL", "jaccard_score_10-12"),
    "wilds/iwildcam": DataSet("iWildCam", _F1),
    "wilds/camelyon17": DataSet("Camelyon17"),
    "wilds/fmow": DataSet("FMoW", "acc_worst_region"),
    "fairness/dollar_street": DataSet("Dollar Street", "acc_top5_wg", ("dollar_street",)),
    "fairness/geode": DataSet("GeoDE", "acc_wg", ("geode",)),
    # Those of CLIP_benchmark's collections that DataComp has not.
    "fer2013": DataSet("FER2013"),
    "flickr8k": DataSet("Flickr8k", _BOTH_WAYS),
    "vtab/diabetic_retinopathy": DataSet("Diabetic Retinopathy"),
    "vtab/dmlab": DataSet("DMLab"),
    "vtab/dsprites_label_orientation": DataSet("dSprites Orientation"),
    "vtab/dsprites_label_x_position": DataSet("dSprites Location"),
    "vtab/smallnorb_label_azimuth": DataSet("SmallNORB Azimuth"),
    "vtab/smallnorb_label_elevation": DataSet("SmallNORB Elevation"),
}

_FAMILIES = {key.partition("/")[0] for key in DATA_SETS if "/" in key}
_COLLECTION_ONLY = 8  # data sets at the end of the table
_SHIFTS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
_VTAB = (
    *("vtab/caltech101", "vtab/cifar100", "vtab/clevr_count_all"),
    *("vtab/clevr_closest_object_distance", "vtab/diabetic_retinopathy", "vtab/dmlab"),
    *("vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position", "vtab/dtd"),
    *("vtab/eurosat", "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets"),
    *("vtab/pcam", "vtab/resisc45", "vtab/smallnorb_label_azimuth"),
    *("vtab/smallnorb_label_elevation", "sun397", "vtab/svhn"),
)
_RETRIEVAL = ("retrieval/flickr30k", "retrieval/mscoco_2014_5k_test_image_text_retrieval")
_DATACOMP = tuple(DATA_SETS)[:-_COLLECTION_ONLY]
# Suite -> average -> its data sets.
SUITES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    _DATACOMP_SUITE: {
        "ImageNet": ("imagenet1k",),
        "ImageNet dist. shifts": (*_SHIFTS, "imagenet-o"),
        "VTAB": tuple(key for key in _VTAB if key in _DATACOMP),
        "Retrieval": (*_RETRIEVAL, "misc/winogavil"),
        "Average": _DATACOMP,
    },
    "vtab": {"Average": _VTAB},
    "vtab+": {
        "Average": (
            *("imagenet1k", *_SHIFTS, "fer2013", "voc2007", "cars", "fgvc_aircraft", "mnist"),
            *("stl10", "gtsrb", "country211", "renderedsst2", "cifar10", *_VTAB),
        )
    },
    "imagenet_robustness": {"Average": _SHIFTS},
    "retrieval": {"Average": (*_RETRIEVAL, "flickr8k")},
    EVERYTHING: {},
}


class SuiteMember(NamedTuple):
    """A data set of a suite that is there.

    Attributes:
        key: in ``DATA_SETS``, or the name of the folder.
        benchmark: what is run on it.
    """

    key: str
    benchmark: Benchmark


def read_suite(
    suite: str,
    folder: str,
    *,
    probes: bool = False,
    loading: LoadSettings | None = None,
) -> list[SuiteMember]:
    """Find the data sets of a suite in a folder.

    A data set is one of retrieval if its dataset_type.txt says so, else one of classification. One
    with several labels a picture is left out, and said in the log.

    Args:
        suite: one of ``SUITES``; "all" for whatever is there.
        folder: of the folders wds_NAME.
        probes: whether those with a folder train have a linear probe, too.
        loading: how shards are read.

    Raises:
        UserError: if there is no such suite or folder, nothing of the suite in it, or a shard that
            nshards.txt counts is missing.
    """
    if suite not in SUITES:
        raise UserError(f"suite ({suite}) must be one of {', '.join(SUITES)}")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"suite_folder ({folder}) is no folder; name that of the folders wds_NAME")
    wanted = {key for keys in SUITES[suite].values() for key in keys}
    loading = LoadSettings() if loading is None else loading
    known = {name: key for key, each in DATA_SETS.items() for name in _folders_of(key, each)}
    found: dict[str, list[SuiteMember]] = {}
    for path in sorted(root.glob("wds_*")):
        name = path.name.removeprefix("wds_").removesuffix("_test")
        key = known.get(name, name)
        if path.is_dir() and (suite == EVERYTHING or key in wanted):
            if key in found:
                raise UserError(
                    f"suite_folder ({folder}) has {path.name} beside another folder of {key}; take "
                    "one of them out"
                )
            found[key] = [SuiteMember(key, each) for each in _members(path, name, probes, loading)]
    members = [member for each in found.values() for member in each]
    if not members:
        raise UserError(
            f"suite_folder ({folder}) has no data set of suite {suite}: folders are called "
            "wds_NAME or wds_NAME_test, such as wds_imagenet1k, and hold test/*.tar"
        )
    missing = sorted(wanted - {each.key for each in members})
    if missing:
        _LOGGER.info("suite %s: not in %s: %s", suite, folder, ", ".join(missing))
    return members


def _folders_of(key: str, data_set: DataSet) -> Iterator[str]:
    yield key.replace("/", "-")
    yield from data_set.folders


def _members(path: Path, name: str, probes: bool, loading: LoadSettings) -> Iterator[Benchmark]:
    """Make the benchmarks of a folder."""
    kind = _text_in(path / "dataset_type.txt").lower() or "classification"
    if kind not in ("classification", "retrieval"):
        _LOGGER.warning("suite: %s is left out: its type is %s", path, kind)
        return
    shards = _shards_of(path / "test")
    made: list[Benchmark] = []
    if kind == "retrieval":
        made.append(Retrieval(shards, name=name, loading=loading))
    else:
        made.append(Classification(shards, name=name, loading=loading))
        if probes and (path / "train").is_dir():
            train = _shards_of(path / "train")
            made.append(LinearProbe(train, shards, name=f"{name}_probe", loading=loading))
    for each in made:
        each.dataset = _dataset_of(name)
        yield each


def _dataset_of(name: str) -> str:
    """Return the name that CLIP_benchmark gives a data set, of that of its folder.

    Example:
        >>> _dataset_of("vtab-pets"), _dataset_of("imagenet-a")
        ('wds/vtab/pets', 'wds/imagenet-a')
    """
    family, _, rest = name.partition("-")
    return f"wds/{family}/{rest}" if family in _FAMILIES and rest else f"wds/{name}"


def _text_in(path: Path) -> str:
    """Read a small file; empty if there is none."""
    try:
        return read_regular(path, _MOST_TEXT_BYTES).decode().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _shards_of(split: Path) -> str | list[str]:
    """Name the shards of a split: as many as nshards.txt says, or those that are there."""
    count = _text_in(split / "nshards.txt")
    if not count:
        return str(split)
    if not (count.isascii() and count.isdigit() and 0 < len(count) <= _MOST_DIGITS):
        raise UserError(f"{split / 'nshards.txt'} ({count[:40]!r}) must hold a number of shards")
    paths = [split / f"{number}.tar" for number in range(int(count))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{split} lacks {len(missing)} of {count} shards that nshards.txt counts, first "
            f"{missing[0].name}; download it again"
        )
    return [str(path) for path in paths]


class Average(NamedTuple):
    """Mean of the data sets that are there.

    Attributes:
        value: NaN if there is none.
        present: data sets in it.
        total: data sets of the table.
    """

    value: float
    present: int
    total: int


def main_metric(suite: str, key: str, result: BenchmarkResult) -> tuple[str, float | None]:
    """Return the metric that stands for a data set in tables, and its value.

    That of DataComp in its own suite; in others ``acc1``, or the mean of both recall@1.

    Args:
        suite: one of ``SUITES``.
        key: of the data set.
        result: of its benchmark.

    Returns:
        Name and value; None if the result has it not.
    """
    metrics = result.metrics
    name = _BOTH_WAYS if "image_retrieval_recall@1" in metrics else _ACC1
    if suite == _DATACOMP_SUITE and key in DATA_SETS:
        name = DATA_SETS[key].metric
    if name == _BOTH_WAYS:
        ways = [metrics.get(f"{way}_retrieval_recall@1") for way in ("image", "text")]
        known = [each for each in ways if each is not None]
        return name, sum(known) / 2 if len(known) == len(ways) else None
    if name == _F1:
        return name, _macro_f1(result.details.get("confusion", ()))
    return name, metrics.get(name)


def _macro_f1(confusion: Sequence[Sequence[int]]) -> float | None:
    """Mean F1 of the classes that occur, of [label, answer, pictures]; None without any."""
    right: dict[int, int] = {}
    own: dict[int, int] = {}
    told: dict[int, int] = {}
    for label, answer, count in confusion:
        own[label] = own.get(label, 0) + count
        told[answer] = told.get(answer, 0) + count
        if label == answer:
            right[label] = count
    scores = [2 * right.get(each, 0) / (own[each] + told.get(each, 0)) for each in own]
    return math.fsum(scores) / len(scores) if scores else None


def suite_averages(suite: str, values: Mapping[str, float]) -> dict[str, Average]:
    """Average the main metrics of a suite, as DataComp's aggregate_scores does.

    Args:
        suite: one of ``SUITES``.
        values: main metric by key, of the data sets that were evaluated.

    Example:
        >>> suite_averages("imagenet_robustness", {"imagenet-a": 0.25, "objectnet": 0.75})
        {'Average': Average(value=0.5, present=2, total=5)}
    """
    groups = SUITES[suite] or {"Average": tuple(values)}
    found = {}
    for name, keys in groups.items():
        there = [values[key] for key in keys if key in values]
        mean = math.fsum(there) / len(there) if there else math.nan
        found[name] = Average(mean, len(there), len(keys))
    return found


class SuiteValues(NamedTuple):
    """Main metrics of a suite, by key, of the data sets that were evaluated."""

    suite: str
    values: dict[str, float]

    @classmethod
    def of(
        cls, suite: str, members: Sequence[SuiteMember], results: Mapping[str, BenchmarkResult]
    ) -> "SuiteValues":
        """Take the main metrics of the results, by name of the benchmark, that have one."""
        found = {
            key: main_metric(suite, key, results[benchmark.name])[1]
            for key, benchmark in members
            if is_counted(benchmark) and benchmark.name in results
        }
        return cls(suite, {key: value for key, value in found.items() if value is not None})

    def as_json(self) -> dict[str, Any]:
        """Averages, and what they are made of."""
        return {
            "suite": self.suite,
            "averages": {
                name: {
                    "value": each.value if each.present else None,
                    "count": each.present,
                    "of": each.total,
                }
                for name, each in suite_averages(self.suite, self.values).items()
            },
            "main_metrics": self.values,
        }


def read_values(suite: str, folder: Path, members: Sequence[SuiteMember]) -> dict[str, float]:
    """Read the main metrics that another run has of these data sets.

    Args:
        suite: one of ``SUITES``.
        folder: RUN/benchmarks of that run.
        members: of the suite; linear probes do not count.

    Raises:
        UserError: if there is none of them, or a file is damaged.
    """
    found = {}
    for key, benchmark in members:
        path = folder / f"{benchmark.name}.json"
        if not is_counted(benchmark) or not path.is_file():
            continue
        try:
            metrics = read_json(path, _MOST_RESULT_BYTES)["metrics"]
            details_path = folder / "details" / path.name
            needs_details = key in DATA_SETS and DATA_SETS[key].metric == _F1
            details: dict[str, Any] = {}
            if needs_details and details_path.is_file():
                details = read_json(details_path, _MOST_RESULT_BYTES)
            numbers = {name: float(value) for name, value in metrics.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no result of a benchmark; run test on it again") from error
        _, value = main_metric(suite, key, BenchmarkResult(numbers, details))
        if value is not None:
            found[key] = value
    if not found:
        raise UserError(
            f"compare ({folder.parent}) has no result of these data sets in benchmarks/; run test "
            "with the suite on it first"
        )
    return found


def is_counted(benchmark: Benchmark) -> bool:
    """Whether a benchmark counts in averages, which are of zero-shot results."""
    return not isinstance(benchmark, LinearProbe)
