"""Which shards does a mixture read, and how much of each source?"""

from dataclasses import dataclass

from dist_siglip.data.order.sequence import Source
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
