"""What may the index of a sharded checkpoint name?

torch keeps it as a pickle. Here it is read by an unpickler that knows the classes of an index and
no other, and that refuses files outside of the folder.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import open_regular

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
