"""Policy for shards that are damaged or unusual, before training starts.

Either the run is refused, with everything that is wrong counted and the first of it named; or the
damage is skipped, named in the log, and bounded.
"""

import logging
from collections.abc import Sequence
from typing import Literal

from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
MAX_BAD_FRACTION = 0.01  # of the samples, and of the shards
_NAMED = 3  # problems in an error text
_REMARKED = 5  # shards in the log

OnDamage = Literal["refuse", "skip"]


class Damage:
    """Collects what is wrong with the shards of one setting, then settles it.

    Args:
        policy: "refuse" or "skip".
        max_fraction: with "skip", the share of samples, and of shards, that may be bad.
        name: the setting the shards came from.

    Raises:
        UserError: if there is no such policy.
    """

    def __init__(self, policy: OnDamage, max_fraction: float, name: str) -> None:
        if policy not in ("refuse", "skip"):
            raise UserError(f"on_damage ({policy}) must be refuse or skip")
        self._policy = policy
        self._max_fraction = max_fraction
        self._name = name
        self._num_shards = 0
        self._num_samples = 0
        self._problems: list[str] = []

    @property
    def is_noted(self) -> bool:
        """Whether anything is wrong."""
        return bool(self._problems)

    def shard(self, problem: str) -> None:
        """Note a damaged shard: what is wrong, naming it."""
        self._num_shards += 1
        self._problems.append(problem)

    def samples(self, count: int, problem: str) -> None:
        """Note incomplete samples of one shard."""
        self._num_samples += count
        self._problems.append(problem)

    def settle(self, *, num_shards: int, num_samples: int) -> None:
        """Refuse or log what was noted.

        Raises:
            UserError: if anything is wrong ("refuse"), or more than the allowed share ("skip").
        """
        if not self._problems:
            return
        shards_allowed = self._max_fraction * num_shards
        samples_allowed = self._max_fraction * num_samples
        few = self._num_shards <= shards_allowed and self._num_samples <= samples_allowed
        if self._policy == "skip" and few:
            for problem in self._problems:
                _LOGGER.warning("skipped: %s", problem)
            _LOGGER.warning("%s: %s are skipped", self._name, self._counts(num_shards, num_samples))
            return
        first = "; ".join(self._problems[:_NAMED])
        if len(self._problems) == 1 and self._policy == "refuse":
            raise UserError(first)
        limit = ""
        if self._policy == "skip":
            limit = f", more than max_bad_fraction ({self._max_fraction}) allows"
        raise UserError(
            f"{self._name}: {self._counts(num_shards, num_samples)} are damaged{limit}: {first}; "
            "dist-siglip data check lists them all"
        )

    def _counts(self, num_shards: int, num_samples: int) -> str:
        return (
            f"{self._num_shards} of {num_shards} shards and {self._num_samples} of {num_samples} "
            "samples"
        )


def log_remarks(remarks: Sequence[str], name: str) -> None:
    """Name what is unusual about shards that are used."""
    for remark in remarks[:_REMARKED]:
        _LOGGER.warning("%s: %s", name, remark)
    if len(remarks) > _REMARKED:
        more = len(remarks) - _REMARKED
        _LOGGER.warning("%s: %d more of this kind; dist-siglip data check lists all", name, more)
