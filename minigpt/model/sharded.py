"""Reading the sharded checkpoints of FSDP2 without ever running code that is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from minigpt.model.restore import refused

# What torch itself writes into `.metadata`, which it reads with an unguarded pickle.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
    "torch": {"Size", *(n for n, kind in vars(torch).items() if isinstance(kind, torch.dtype))},
}


class _AllowedOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's, but the table of what lies where is made of allowed classes only."""

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _AllowedOnly(file).load()
        return metadata


class _Planner(DefaultLoadPlanner):
    """torch's, but a value that is no tensor is plain."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def saved_shapes(path: Path) -> dict[str, torch.Size]:
    """Return the shapes of all tensors in a checkpoint, by name.

    Raises:
        ModelError: when its table is missing, damaged, or holds code.
    """
    try:
        entries = _Reader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle raises anything
        raise refused(path) from error
    return {n: m.size for n, m in entries.items() if isinstance(m, TensorStorageMetadata)}


def load_into(state: dict[str, Any], path: Path) -> None:
    """Fill a state from a checkpoint's shards; every process must call this.

    Raises:
        ModelError: when they are damaged, lack something, or hold code.
    """
    try:
        load(state, storage_reader=_Reader(path), planner=_Planner())
    except CheckpointException as error:
        raise refused(path) from error
