"""Writing and reading of checkpoints: atomic, optionally in the background, without pickled code.

Lightning's own writer moves the file from the default temporary folder; across file systems that is
a plain copy onto the final name, and a full disk then costs the previous checkpoint too.

In the background a copy in the memory of the host is written by a thread, one at a time.
"""

import copy
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_siglip.errors import UserError
from dist_siglip.runs import check_sound
from dist_siglip.runs.checkpoints import sharded
from dist_siglip.runs.checkpoints.selection import save_sealed
from dist_siglip.runs.checkpoints.sharded import is_sharded, read_whole, stored_shapes
from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.regular_file import check_regular


class BackgroundWrite:
    """One piece of work at a time in a thread; it is done before Python ends."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[None]] | None = None

    def start(self, step: int, work: Callable[[], None]) -> None:
        """Begin; what was begun before has been finished."""
        assert self._running is None, "two checkpoints would be written at once"
        self._running = (step, self._threads.submit(work))

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is begun and not finished."""
        return None if self._running is None else self._running[0]

    def finish(self) -> None:
        """Wait until it is written.

        Raises:
            OSError: if it could not be.
        """
        if self._running is not None:
            _, future = self._running
            self._running = None
            future.result()

    def wait(self) -> None:
        """Wait until it is written or has failed; ``finish`` tells which."""
        if self._running is not None:
            wait([self._running[1]])


class Snapshot:
    """Copy of a nest of tensors and plain values in the memory of the host.

    From CUDA it goes to pinned memory on a stream of its own: neither the host nor the device waits
    for it until ``read`` or ``hold``.
    """

    def __init__(self, value: Any) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._content = self._copy(value)
        self._arrivals = []
        for device, stream in self._streams.items():
            arrival = torch.cuda.Event()
            arrival.record(stream)
            self._arrivals.append((device, arrival))

    def hold(self) -> None:
        """Let what the devices are told from now on wait for the copy: it may change the values."""
        for device, arrival in self._arrivals:
            torch.cuda.current_stream(device).wait_event(arrival)

    def read(self) -> Any:
        """Return the copy, once it is whole; any thread may call it."""
        for _, arrival in self._arrivals:
            arrival.synchronize()
        return self._content

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            return {key: self._copy(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._copy, value))
        return copy.deepcopy(value)

    def _copy_tensor(self, value: Tensor) -> Tensor:
        if value.device.type != "cuda" or isinstance(value, DTensor):
            return value.to("cpu", copy=True)
        try:
            copied = torch.empty_like(value, device="cpu", pin_memory=True)
        except RuntimeError:  # no more memory can be pinned
            return value.to("cpu", copy=True)
        stream = self._streams.get(value.device)
        if stream is None:
            stream = self._streams[value.device] = torch.cuda.Stream(value.device)
            stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            copied.copy_(value, non_blocking=True)
        value.record_stream(stream)  # its memory is not given away before
        return copied


class AtomicCheckpointIO(CheckpointIO):
    """Write beside the final name, sync, rename; read with ``weights_only=True``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``; at any instant ``path`` is the old file or the new one.

        The file ends in its checksum.

        Raises:
            UserError: if storage options are given; checkpoints go to a local folder.
            OSError: if it cannot be written; what was there before stays.
        """
        if storage_options is not None:
            raise UserError(
                f"storage_options ({storage_options!r}) have no meaning for local checkpoints; "
                "leave them out"
            )
        with open_atomically(Path(path)) as file:
            save_sealed(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values; no pickled object is ever built.

        Raises:
            UserError: if the file is missing or no such checkpoint, or ``weights_only`` is False.
        """
        if weights_only is False:
            raise UserError(
                "weights_only (False) would execute code from the checkpoint; leave it out"
            )
        return read_checkpoint(Path(path), map_location=map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint that is no longer kept; a folder loses its name first."""
        path = Path(path)
        if path.is_dir():
            hidden = path.with_name(f".{path.name}.{uuid4().hex}.old")
            path.rename(hidden)
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)


def read_checkpoint(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint without executing anything; see ``AtomicCheckpointIO``.

    Its bytes are compared with their checksum first. A sharded one, a folder, is put together as
    the file it could have been.
    """
    _check_exists(path)
    check_sound(path)
    if is_sharded(path):
        return read_whole(path)
    return _read_file(path, map_location=map_location)


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the weights of a checkpoint by name; the weights are not read."""
    _check_exists(path)
    if is_sharded(path):
        return stored_shapes(path)
    state = _read_file(path, mmap=True)["state_dict"]
    return {name: value.shape for name, value in state.items()}


def read_values(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds beside weights and states of optimizers; these are not read."""
    _check_exists(path)
    content = sharded.read_values(path) if is_sharded(path) else _read_file(path, mmap=True)
    heavy = ("state_dict", "current_model_state", "optimizer_states", "param_groups")
    return {name: value for name, value in content.items() if name not in heavy}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"checkpoint ({path}) does not exist; name an existing .ckpt file")


def _read_file(path: Path, **options: Any) -> dict[str, Any]:
    try:
        check_regular(path)
        content = torch.load(path, weights_only=True, **options)
    # A damaged or foreign file surfaces as one of these, depending on where reading stops.
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        AttributeError,
        OSError,
    ) as error:
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"checkpoint ({path}) holds no state_dict; name a checkpoint of fit")
    return content


def _unreadable(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"checkpoint ({path}) cannot be read ({reason[:160]}); it is damaged, or holds more than "
        "tensors and plain values; use another one"
    )
