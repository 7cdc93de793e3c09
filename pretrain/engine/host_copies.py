"""Copies in host memory of what is to be saved, which pickle to the same bytes as the originals."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn


class HostCopies:
    """Copies nested structures with their tensors into buffers of the host, which are kept and used again.

    Memory is that of one save: :meth:`restart` makes all buffers free again, so that only one copy lives at a time. Of
    tensors on a GPU the copies are pinned, and made in the order of its stream: what is launched later may change the
    originals at once, and :meth:`wait` says when the copies are whole.

    ``torch.save`` writes storages, not tensors, and numbers whatever occurs twice: a storage is copied whole and once,
    and one object stays one object, so that both are written as they would have been.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffers: dict[int, list[UntypedStorage]] = {}
        self._used: dict[int, int] = {}
        """Buffers in use, of each size."""
        self._copied: torch.Event | None = None

    def restart(self) -> None:
        """Forget the copies that were made: their memory is used again."""
        self._used = {}

    def wait(self) -> None:
        """Until the copies are whole; in any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def bytes(self) -> int:
        """Host memory that is held for copies."""
        return sum(size * len(buffers) for size, buffers in self._buffers.items())

    @torch.no_grad()
    def copy(self, content: Any) -> Any:
        """A copy of ``content``, of whose tensors nothing is shared with the originals."""
        copied = self._copy(content, {}, {})
        if self._on_gpu:
            self._copied = torch.Event(torch.device("cuda"))
            self._copied.record()
        return copied

    def _copy(self, value: Any, memo: dict[int, Any], storages: dict[int, UntypedStorage]) -> Any:
        """``memo`` has the copies by the originals' ids, as ``copy.deepcopy`` keeps them."""
        if id(value) in memo:
            return memo[id(value)]
        made: Any
        if isinstance(value, Tensor):
            made = memo[id(value)] = self._copy_tensor(value, storages)
            for name, attribute in vars(value).items():  # DeepSpeed gives some to its tensors; they are saved too
                setattr(made, name, self._copy(attribute, memo, storages))
        elif isinstance(value, dict):
            # of a module's state, an OrderedDict with attributes: those come along
            made = memo[id(value)] = {} if type(value) is dict else copy.copy(value)
            for key, item in value.items():
                made[key] = self._copy(item, memo, storages)
        elif type(value) is list:
            made = memo[id(value)] = []
            made.extend(self._copy(item, memo, storages) for item in value)
        elif type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):
            items = [self._copy(item, memo, storages) for item in value]
            same = all(item is original for item, original in zip(items, value, strict=True))
            made = value if same else tuple(items) if type(value) is tuple else type(value)(*items)
            memo[id(value)] = made
        else:
            made = copy.deepcopy(value, memo)
        return made

    def _copy_tensor(self, tensor: Tensor, storages: dict[int, UntypedStorage]) -> Tensor:
        original = tensor.untyped_storage()
        if original._cdata not in storages:
            storages[original._cdata] = self._copy_storage(original)
        made = torch.empty(0, dtype=tensor.dtype)
        made.set_(storages[original._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    def _copy_storage(self, original: UntypedStorage) -> UntypedStorage:
        size = original.nbytes()
        buffer = self._buffer(size)
        if size:
            source, target = (_as_bytes(storage) for storage in (original, buffer))
            target.copy_(source, non_blocking=True)
        return buffer

    def _buffer(self, size: int) -> UntypedStorage:
        buffers, used = self._buffers.setdefault(size, []), self._used.get(size, 0)
        self._used[size] = used + 1
        if used == len(buffers):
            pinned = self._on_gpu and size > 0
            buffers.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage())
        return buffers[used]


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
