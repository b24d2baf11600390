"""How many bytes of tensors are alive, counted as they come and go: on any device, and without one."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes(...) as live:`, `live.now` and `live.peak` are the bytes of all tensors known to be alive.

    Known are those given, and those that an operation inside takes or gives, once a storage, however many views of it
    there are. What an operation allocates and frees within itself does not show. Works under torch's FakeTensorMode
    too, whose tensors have a size and no memory.
    """

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # by the address of the storage, which its tensors share
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
