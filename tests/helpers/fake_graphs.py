"""Graphs without a GPU: they do on CPU tensors what a CUDA graph does, and complain where it would go wrong.

A CUDA graph replays launches on the addresses that it was captured with. So the fake notes which memory the
captured work takes from outside, by every way in which torch or a native kernel can get at it, and fails when
a replay takes another. It also fails when the host looks at a value, for which a CUDA host would wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount", "is_nonzero")


class HostWaited(AssertionError):
    """The host looked at a value: on CUDA it would wait for everything launched so far."""


class PointerMoved(AssertionError):
    """A replay would read or write memory that the graph does not know."""


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(_WAITS):
            raise HostWaited(str(func))
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise HostWaited(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host looks at what a tensor holds, or torch would have to."""

    def refuse(name: str) -> Callable[..., Any]:
        def raiser(*args: object, **kwargs: object) -> Any:
            raise HostWaited(f"Tensor.{name}")

        return raiser

    stock = {name: getattr(Tensor, name) for name in _READS}
    for name in _READS:
        setattr(Tensor, name, refuse(name))
    try:
        with _NoWaiting():
            yield
    finally:
        for name, method in stock.items():
            setattr(Tensor, name, method)


class _Memory(TorchDispatchMode):
    """Notes the storages that come from outside, and which of them are written."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self._kept: dict[int, Tensor] = {}  # what was made inside, so that no address is used twice

    def use(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage()._cdata
        if address not in self._kept:
            self.outside.add(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in before}
        for tensor in before:
            self.use(tensor)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._kept[tensor.untyped_storage()._cdata] = tensor
        return result

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Native kernels get at memory by its address."""
        stock = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            self.use(tensor)
            return stock(tensor)

        Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            Tensor.data_ptr = stock  # type: ignore[method-assign]


class FakeGraph:
    """Repeats what was captured, and checks that it is on the same memory."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch
        self.memory = self._run()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        memory = self._run()
        if memory != self.memory:
            raise PointerMoved(f"{len(memory - self.memory)} pieces of memory are not the captured ones")

    def _run(self) -> set[int]:
        memory = _Memory()
        with no_waiting(), memory.noting():
            self._launch()
        return memory.outside


class FakeGraphs:
    """A GraphMaker for CPU tensors.

    Attributes:
        graphs: what was captured, in order.
        fail: what the next capture raises.
    """

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.fail: Exception | None = None

    def capture(self, launch: Callable[[], None]) -> FakeGraph:
        if self.fail is not None:
            raise self.fail
        self.graphs.append(FakeGraph(launch))
        return self.graphs[-1]

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)
