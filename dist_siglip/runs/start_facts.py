"""What must all ranks of a start have in common?

Their settings, the code of this package, and the libraries it stands on. What a setting points at
is compared elsewhere: shards by the fingerprint of their content.
"""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dist_siglip.runs.identity import flatten
from dist_siglip.runs.provenance import installed_versions

# A node may have its own copy, at its own path: only whether there is one is compared.
_PLACES = frozenset(
    {
        "data.train_shards",
        "data.val_shards",
        "data.train_features",
        "data.bad_sample_log",
        "data.cache.folder",
    }
)
# Where the settings were read from, and what is a node's own business.
_FREE = frozenset({"config", "data.cache.max_gib"})


def describe_start(config: Mapping[str, Any], **numbers: object) -> dict[str, str]:
    """Write down what this rank was started with, readable value by readable name.

    Args:
        config: resolved settings, nested, of plain values.
        numbers: what follows from them here: ranks, pairs of a batch, the checkpoint.

    Example:
        >>> facts = describe_start({"trainer": {"max_steps": 5}}, world_size=2)
        >>> facts["trainer.max_steps"], facts["world_size"], "torch" in facts
        ('5', '2', True)
    """
    facts = {name: str(value) for name, value in numbers.items()}
    facts["code of dist_siglip"] = digest_of_sources()
    facts["python"] = platform.python_version()
    facts |= {name: str(version) for name, version in installed_versions().items()}
    for name, value in flatten(config):
        if name in _PLACES:
            facts[name] = "null" if value is None else "set"
        elif name not in _FREE:
            facts[name] = repr(value)
    return facts


@cache
def digest_of_sources() -> str:
    """First digits of the SHA-256 of every Python file of this package, names included.

    Example:
        >>> len(digest_of_sources())
        12
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
