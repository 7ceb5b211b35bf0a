"""Shards of each setting of the data module, and the weights of a mixture's sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dist_siglip.data.index.damage import MAX_BAD_FRACTION, OnDamage
from dist_siglip.data.index.pairs import PairTable, build_pair_table, read_table
from dist_siglip.data.order.position import BatchPlan
from dist_siglip.data.order.sequence import Source
from dist_siglip.data.remote import ShardCache
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainSource:
    """One source of a training mixture.

    Args:
        name: of its metrics and log lines.
        shards: as ``train_shards``.
        weight: share of the draws relative to the other sources, > 0. Null: in proportion to its
            samples.
    """

    name: str
    shards: str | list[str]
    weight: float | None = None


def check_sources(sources: list[TrainSource] | None, train_shards: str | list[str] | None) -> None:
    """Refuse sources that contradict each other or ``train_shards``.

    Raises:
        UserError: if both are set, a name occurs twice, only some sources have a weight, or a
            weight is not positive.
    """
    if sources is None:
        return
    if train_shards is not None:
        raise UserError("train_shards and train_sources are both set; set one of them")
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        problem = f"name {repeated[0]!r} twice" if repeated else "name no source"
        raise UserError(f"train_sources {problem}; give every source a name of its own")
    # Not in the class: a parser would bury its complaint among those about other types.
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise UserError(
                f"weight ({source.weight}) of source {source.name!r} must be > 0; leave the "
                "source out to read nothing of it"
            )
    if len({source.weight is None for source in sources}) > 1:
        raise UserError("train_sources must give all sources a weight, or none")


def expand_sources(sources: list[TrainSource]) -> list[list[str]]:
    """List the shards of each source.

    Raises:
        UserError: if shards are missing, or one is named by two sources.
    """
    expanded = [
        expand_shards(source.shards, name=f"train_sources {source.name!r}") for source in sources
    ]
    # Together once more: the same shard in two sources would be drawn at two paces.
    expand_shards([path for paths in expanded for path in paths], name="train_sources")
    return expanded


def weigh_sources(
    sources: list[TrainSource], expanded: list[list[str]], counts: tuple[int, ...]
) -> tuple[Source, ...]:
    """Share out the samples per shard among the sources, and settle their weights."""
    found, first = [], 0
    for source, paths in zip(sources, expanded, strict=True):
        own = counts[first : first + len(paths)]
        weight = float(sum(own)) if source.weight is None else source.weight
        found.append(Source(source.name, own, weight))
        first += len(paths)
    return tuple(found)


class ShardTables:
    """The tables of training and validation shards, each built once in this process.

    Args:
        train_shards: specification of the training shards, or None.
        train_sources: sources of a mixture instead, or None.
        val_shards: specification of the validation shards, or None.
        image_extensions: members that are the picture of a sample, in order of preference.
        caption_extensions: members that hold its captions, likewise.
        other_extensions: further members to find.
        on_damage: "refuse" or "skip".
        max_bad_fraction: share of shards and samples that may be skipped.
        cache: copies of remote shards.

    Raises:
        UserError: if ``train_sources`` contradict each other or ``train_shards``.
    """

    def __init__(
        self,
        *,
        train_shards: str | list[str] | None,
        train_sources: list[TrainSource] | None,
        val_shards: str | list[str] | None,
        image_extensions: tuple[str, ...],
        caption_extensions: tuple[str, ...] = ("txt",),
        other_extensions: tuple[str, ...] = (),
        on_damage: OnDamage = "refuse",
        max_bad_fraction: float = MAX_BAD_FRACTION,
        cache: ShardCache | None = None,
    ) -> None:
        check_sources(train_sources, train_shards)
        self._specifications = {"train_shards": train_shards, "val_shards": val_shards}
        self._train_sources = train_sources
        self._build = partial(
            build_pair_table,
            image_extensions=image_extensions,
            caption_extensions=caption_extensions,
            other_extensions=other_extensions,
            on_damage=on_damage,
            max_bad_fraction=max_bad_fraction,
            cache=cache,
        )
        self._cache = cache
        self._source_paths: list[list[str]] = []
        self._built: dict[str, PairTable] = {}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        return self._specifications["train_shards"] is not None or self._train_sources is not None

    def settings_of(self, stage: str) -> list[str]:
        """Name the settings whose shards a stage of the trainer reads."""
        if stage != "fit":
            return ["val_shards"]
        validates = self._specifications["val_shards"] is not None
        return ["train_shards", "val_shards"] if validates else ["train_shards"]

    def of(self, name: str) -> PairTable:
        """Return the table of a setting, ``train_shards`` (or its sources) or ``val_shards``.

        Raises:
            UserError: if the setting is null, or its shards are missing or damaged.
        """
        if name not in self._built:
            self._built[name] = self._build(self._expand(name), name=name)
        return self._built[name]

    def files(self) -> dict[str, tuple[str, str]]:
        """What was named and the file of its table, by setting; of tables that are kept in one."""
        return {
            name: (repr(self._specifications[name]), table.file)
            for name, table in self._built.items()
            if table.file is not None
        }

    def take_over(self, files: Mapping[str, Sequence[str]]) -> None:
        """Map tables that another process of this machine has made, without a look at any shard.

        Args:
            files: of ``files``; a table that is gone, or of other shards, is as if it were not
                named.
        """
        if self._train_sources is not None:
            return  # which of its shards belong to which source is found by listing them
        for name, (named, file) in files.items():
            is_meant = named == repr(self._specifications[name])
            table = read_table(file, self._cache) if is_meant else None
            if table is not None:
                self._built[name] = table

    def plan(self, *, seed: int, global_batch_size: int, block_shards: int) -> BatchPlan:
        """Plan the global batches over the training shards.

        Raises:
            UserError: as ``of``, or if there are too few samples for a batch.
        """
        table = self.of("train_shards")
        sources = self._train_sources
        return BatchPlan(
            counts=table.counts,
            fingerprint=table.fingerprint,
            seed=seed,
            global_batch_size=global_batch_size,
            block_shards=block_shards,
            sources=()
            if sources is None
            else weigh_sources(sources, self._source_paths, table.counts),
        )

    def source_ranges(self) -> list[tuple[int, int]]:
        """Say which training ids belong to each source: (first, after the last); one for all."""
        starts = self.of("train_shards").starts.tolist()
        if self._train_sources is None:
            return [(0, starts[-1])]
        ranges, shard = [], 0
        for paths in self._source_paths:
            ranges.append((starts[shard], starts[shard + len(paths)]))
            shard += len(paths)
        return ranges

    def _expand(self, name: str) -> list[str]:
        if name == "train_shards" and self._train_sources is not None:
            self._source_paths = expand_sources(self._train_sources)
            return [path for of_source in self._source_paths for path in of_source]
        specification = self._specifications[name]
        if specification is None:
            raise UserError(f"{name} (null) must name the shards to read")
        return expand_shards(specification, name=name)
