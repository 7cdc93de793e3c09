"""Work beside the training: done by each rank in a thread, agreed on by all ranks between two steps of the training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Parts: TypeAlias = Generator[Callable[[], Any], Any, T]
"""Yields one piece of work after another, is sent what it returned, and returns the result of the whole.

A piece of work is this rank's alone and communicates with nobody: a second thread in the ranks' collectives would mix
its own with those of the training. What the ranks have to agree on stands between the pieces, which all ranks come to
together.
"""


class Beside(Generic[T]):
    """Goes through ``parts``. All methods but :attr:`busy` are collective.

    A thread and not a process: what takes time here (writing, flushing, hashing, the network) lets go of the
    interpreter's lock, a process forked from one with the threads of gloo, NCCL or a loader may hang, and a fresh one
    costs seconds and memory for its imports, and the copy of the state would have to lie in shared memory, of which
    containers have little.

    Args:
        parts: up to the first piece of work they run at once.
        pool: of one thread; None does each piece where it comes up.
    """

    def __init__(self, parts: Parts[T], pool: ThreadPoolExecutor | None) -> None:
        self._parts = parts
        self._pool = pool
        self._work: Future[Any] | None = None
        self._result: T
        self._send(None)

    @property
    def busy(self) -> bool:
        """Whether this rank still works."""
        return self._work is not None and not self._work.done()

    def advance(self) -> bool:
        """Go on to the next piece of work; when no rank is :attr:`busy`. Returns whether all is done.

        Raises:
            whatever the parts raise, which they do on all ranks, or this rank's work, which is an error in the program.
        """
        if self._work is not None:
            self._send(self._work.result())
        return self._work is None

    def finish(self) -> T:
        """Wait for all parts."""
        while not self.advance():
            pass
        return self._result

    def _send(self, value: Any) -> None:
        self._work = None
        try:
            work = self._parts.send(value)
        except StopIteration as end:
            self._result = end.value
            return
        if self._pool is not None:
            self._work = self._pool.submit(work)
        else:
            self._work = Future()
            self._work.set_result(work())
