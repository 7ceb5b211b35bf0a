"""Sharded checkpoints: a folder that all ranks write together and any number of ranks reads.

A folder of ``torch.distributed.checkpoint`` that holds tensors only, a file of plain values, and a
list of checksums. It appears under its name when every rank has written its part; if one cannot,
all raise. Nothing in it is executed when it is read: tensors and values load with
``weights_only=True``, and torch's pickled index is read by an unpickler that knows the classes of
an index alone and refuses files outside of the folder.

Optimizer state is keyed by parameter name instead of number (``torch.optim`` numbers parameters
group by group), so a run with or without shards can go on from the other's checkpoint.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.selection import (
    cause_of,
    list_checksums,
    save_sealed,
    seal_folder,
)
from dist_siglip.system.atomic import sync_folder
from dist_siglip.system.process_lock import check_place
from dist_siglip.system.regular_file import check_regular, open_regular

INDEX = ".metadata"
# What the index is made of: how large each tensor is and where its pieces lie.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
_VALUES = "values.pt"
_MODEL = "model/"
_OPTIMIZER = "optimizer/"
_T = TypeVar("_T")


def by_name(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Rename the numbers of ``optimizer.state_dict()`` to names of parameters.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> by_name(optimizer.state_dict(), optimizer, layer)["param_groups"][0]["params"]
        ['weight', 'bias']
    """
    if not has_numbers(state):
        return state
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return _rename(state, dict(enumerate(ordered)))


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Number the names of a state again, group by group, as ``torch.optim`` expects.

    Example:
        >>> by_number({"state": {"b": 1}, "param_groups": [{"params": ["a", "b"]}]})
        {'state': {1: 1}, 'param_groups': [{'params': [0, 1]}]}
    """
    if has_numbers(state):
        return state
    ordered = [name for group in state["param_groups"] for name in group["params"]]
    return _rename(state, {name: number for number, name in enumerate(ordered)})


def has_numbers(state: Mapping[str, Any]) -> bool:
    """Whether the parameters of an optimizer's state are numbered, as those of ``torch.optim`` are.

    Example:
        >>> has_numbers({"param_groups": [{"params": [0]}]})
        True
    """
    return any(isinstance(key, int) for group in state["param_groups"] for key in group["params"])


def _rename(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    return {
        **state,
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


class IndexedReader(FileSystemReader):
    """Reads an index that names no foreign class and no file outside of the folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index as ``read_index`` does."""
        index = read_index(self.folder)
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_of_torch = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if is_of_torch or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}")


def read_index(path: Path) -> Metadata:
    """Read the index of a folder; no other class than those of an index is made.

    Raises:
        UserError: if it is damaged, or names other classes or files elsewhere.
    """
    try:
        with open_regular(path / INDEX) as file:
            index = _IndexUnpickler(file).load()
        names = {Path(info.relative_path) for info in index.storage_data.values()}
    # A damaged pickle fails in as many ways as it has instructions.
    except Exception as error:
        raise UserError(damaged(path, error)) from error
    if not isinstance(index, Metadata) or any(len(name.parts) != 1 for name in names):
        raise UserError(damaged(path, ValueError("the index names files outside of the folder")))
    return index


def damaged(path: Path, error: BaseException) -> str:
    """The line that says a checkpoint cannot be read, and why."""
    return (
        f"checkpoint ({path}) cannot be read ({reason_of(error)}); it is damaged; use another one"
    )


def reason_of(error: BaseException) -> str:
    """One line; of an error that torch collected from all ranks, that of the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:160] or type(error).__name__


def is_sharded(path: Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return (path / INDEX).is_file()


def write_sharded(
    checkpoint: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint, whose tensors may be sharded, as one folder.

    Distributed contract: every rank of the group calls it, with its shards of the same tensors.
    The folder is complete when it has its name. A failure of any rank is raised on all.

    Args:
        checkpoint: "state_dict" with tensors by name, "optimizer_states" with one state by
            parameter name ("state", "param_groups"), and plain values, those of the first rank.
        path: the folder; one of that name is replaced.
        group: all ranks; None is the default group. A thread needs one of its own.

    Raises:
        OSError: if a file cannot be written; nothing is left behind, and an older folder stays.
    """
    values = dict(checkpoint)
    tensors = {_MODEL + name: value for name, value in values.pop("state_dict").items()}
    groups = []
    for number, state in enumerate(values.pop("optimizer_states", [])):
        groups.append(state["param_groups"])
        tensors |= flatten_optimizer(state, number)
    values["param_groups"] = groups
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    beside = [path.with_name(f".{path.name}.{uuid4().hex}.tmp")]
    if dist.is_initialized():
        dist.broadcast_object_list(beside, group=group, group_src=0)
    folder = beside[0]

    def finish(listed: list[dict[str, tuple[int, int]]]) -> None:
        with (folder / _VALUES).open("wb") as file:
            save_sealed(values, file)
            file.flush()
            os.fsync(file.fileno())
        all_files = list_checksums([folder / INDEX, folder / _VALUES])
        for files in listed:
            all_files |= files
        seal_folder(folder, all_files)
        _put_in_place(folder, path)

    try:
        together(lambda: _make(folder) if rank == 0 else None, group)
        with _quiet_alone():
            save(tensors, storage_writer=_Writer(folder, overwrite=True), process_group=group)
        written = together(lambda: list_checksums(folder.glob(f"__{rank}_*")), group)
        together(lambda: finish(written) if rank == 0 else None, group)
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, CheckpointException):
            first = min(error.failures, default=0)
            raise OSError(f"rank {first}: {reason_of(error)}") from error
        raise


def together(work: Callable[[], _T], group: dist.ProcessGroup | None = None) -> list[_T]:
    """Call ``work`` on every rank of a group and return the results of all.

    Raises:
        OSError: on every rank, if it was raised on any; the text names the first such rank.
    """
    if not dist.is_initialized():
        return [work()]
    results: list[Any] = [None] * dist.get_world_size(group)
    mine: tuple[_T | None, str | None] = (None, None)
    try:
        mine = (work(), None)
    except OSError as error:
        mine = (None, reason_of(error))
    dist.all_gather_object(results, mine, group=group)
    for rank, (_, problem) in enumerate(results):
        if problem is not None:
            raise OSError(f"rank {rank}: {problem}")
    return [result for result, _ in results]


def _make(folder: Path) -> None:
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)


def read_values(path: Path) -> dict[str, Any]:
    """Read what is no tensor; "param_groups" lists the groups of each optimizer.

    Raises:
        UserError: if the folder is damaged or holds more than plain values.
    """
    try:
        check_regular(path / _VALUES)
        values = torch.load(path / _VALUES, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(damaged(path, error)) from error
    if not isinstance(values, dict):
        raise UserError(damaged(path, TypeError("values.pt is no table of values")))
    return values


def read_into(
    path: Path, model: Mapping[str, Any], optimizers: list[dict[str, Any]] | None = None
) -> None:
    """Fill tensors, sharded or not, from a checkpoint of any number of ranks, in place.

    Distributed contract: every rank of the default group calls it with the same names.

    Args:
        path: the folder.
        model: tensors by name, as "state_dict" had them.
        optimizers: states by parameter name, as "optimizer_states" had them.

    Raises:
        UserError: if the folder is damaged, or lacks a tensor.
    """
    tensors = {_MODEL + name: value for name, value in model.items()}
    for number, state in enumerate(optimizers or []):
        tensors |= flatten_optimizer(state, number)
    _load(path, tensors)


def read_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint in one process, as ``write_sharded`` was given it, its tensors whole.

    Raises:
        UserError: if the folder is damaged.
    """
    values = read_values(path)
    index = read_index(path)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in index.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    _load(path, tensors, no_dist=True)
    groups = values.pop("param_groups", [])
    states: list[dict[str, Any]] = [{"state": {}, "param_groups": each} for each in groups]
    model: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(_MODEL):
            model[name.removeprefix(_MODEL)] = value
        else:
            _, number, parameter, key = name.split("/")
            states[int(number)]["state"].setdefault(parameter, {})[key] = value
    return {**values, "state_dict": model, "optimizer_states": states}


def stored_states(path: Path, num_optimizers: int) -> list[set[str]]:
    """Names of the parameters that each optimizer has a state of, from the index alone.

    Raises:
        UserError: if the folder is damaged.
    """
    found: list[set[str]] = [set() for _ in range(num_optimizers)]
    for key in read_index(path).state_dict_metadata:
        if key.startswith(_OPTIMIZER):
            _, number, name, _ = key.split("/")
            if int(number) < num_optimizers:
                found[int(number)].add(name)
    return found


def stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors of "state_dict" by name, from the index alone.

    Raises:
        UserError: if the folder is damaged.
    """
    return {
        name.removeprefix(_MODEL): stored.size
        for name, stored in read_index(path).state_dict_metadata.items()
        if name.startswith(_MODEL) and isinstance(stored, TensorStorageMetadata)
    }


def flatten_optimizer(state: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """Name each tensor of an optimizer's state: ``optimizer/NUMBER/PARAMETER/KEY``.

    Example:
        >>> state = {"state": {"w": {"step": torch.tensor(3.0)}}, "param_groups": []}
        >>> flatten_optimizer(state, 0)
        {'optimizer/0/w/step': tensor(3.)}
    """
    return {
        f"{_OPTIMIZER}{number}/{parameter}/{key}": value
        for parameter, entries in state["state"].items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _load(path: Path, tensors: dict[str, Tensor], *, no_dist: bool = False) -> None:
    try:
        with _quiet_alone():
            load(tensors, storage_reader=IndexedReader(path), no_dist=no_dist)
    except UserError:
        raise
    except (CheckpointException, OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(damaged(path, error)) from error


class _Writer(FileSystemWriter):
    """Names the failure to write, not what it does to torch's archive writer."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise cause_of(error) from None


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without torch's remark that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _put_in_place(folder: Path, path: Path) -> None:
    """Give a folder its name; what had the name before goes after that."""
    old = path.with_name(f".{path.name}.{uuid4().hex}.old")
    if path.exists():
        path.rename(old)
    try:
        folder.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_folder(path.parent)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
