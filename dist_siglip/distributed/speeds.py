"""Speeds of a rank and its links, which the cost model of the exchanges reckons with.

They are guesses until ``doctor`` or ``bench loss`` has measured some on this machine: ``remember``
keeps them in the user's cache folder.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from dist_siglip.errors import UserError
from dist_siglip.system.atomic import user_cache_folder, write_atomically
from dist_siglip.system.regular_file import read_json

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speeds:
    """What a rank and its links reach.

    Args:
        teraflops: 1e12 floating-point operations per second that one GPU reaches in matmuls.
        nvlink_gb_s: 1e9 bytes per second one GPU sends inside the node.
        nic_gb_s: 1e9 bytes per second one network card sends; one card per GPU.
        latency_us: microseconds a batch of transfers costs beyond its bytes.
        host_us: microseconds the host needs to launch one visit.
    """

    teraflops: float = 400.0
    nvlink_gb_s: float = 300.0
    nic_gb_s: float = 50.0
    latency_us: float = 15.0
    host_us: float = 150.0

    def __post_init__(self) -> None:
        for name in ("teraflops", "nvlink_gb_s", "nic_gb_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0")
        for name in ("latency_us", "host_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 0")


# Of a core and Ethernet: of runs on CPUs.
_CPU_SPEEDS = Speeds(teraflops=0.05, nvlink_gb_s=2.0, nic_gb_s=1.0, latency_us=100.0, host_us=100.0)


def known_speeds(device_type: str) -> Speeds:
    """Return what was measured on this machine; guesses for what was not.

    A file that is of no use counts as none.

    Args:
        device_type: of the features, "cpu" or "cuda".
    """
    return replace(_guess(device_type), **_measured(device_type))


def remember(device_type: str, **measured: float) -> Path | None:
    """Keep measured ``Speeds``, for ``known_speeds`` of later runs.

    Returns:
        The file; None if it cannot be written.

    Raises:
        UserError: if a value is out of its range.
    """
    replace(known_speeds(device_type), **measured)  # checks them
    file = _speeds_file(device_type)
    try:
        values = {**_measured(device_type), **measured}
        write_atomically(file, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        _LOGGER.debug("measured speeds are not kept: %s", error)
        return None
    return file


def _guess(device_type: str) -> Speeds:
    return _CPU_SPEEDS if device_type == "cpu" else Speeds()


def _measured(device_type: str) -> dict[str, float]:
    try:
        values = read_json(_speeds_file(device_type)).items()
        found = {name: float(value) for name, value in values}
        replace(_guess(device_type), **found)  # checks them
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _LOGGER.warning("measured speeds are of no use (%s); taking guesses", error)
        return {}
    return found


def _speeds_file(device_type: str) -> Path:
    return Path(user_cache_folder("speeds")) / f"{device_type}.json"
