"""Engines one after another in one process."""

from __future__ import annotations

import gc
import weakref

from tests.ranks import run_on_ranks

from .steps import VOCABULARY, tiny_config


def followed() -> list[bool]:
    """Whether an engine that nobody holds is gone when the next one asks DeepSpeed for its own. At the stages where it
    can go: at 2 and 3 DeepSpeed's hooks hold it for as long as the process lives."""
    import deepspeed

    from pretrain.distributed import start
    from pretrain.engine import Engine

    ranks, initialize, gone = start(60), deepspeed.initialize, []
    gc.disable()  # nobody else collects
    earlier: list[weakref.ref[Engine]] = []

    def watched(**given: object) -> object:
        gone.extend(engine() is None for engine in earlier[-1:])
        return initialize(**given)

    deepspeed.initialize = watched
    for stage in (0, 1, 0):
        config = tiny_config(engine={"zero_stage": stage}, training={"global_batch": 2, "micro_batch": 2})
        engine = Engine(config, VOCABULARY, ranks)
        earlier.append(weakref.ref(engine._engine))
        del engine
    return gone


def test_an_engine_dies_before_the_next_one_imports() -> None:
    """Its finalizer imports: within an import of the next one that is a KeyError of Python's import locks."""
    assert run_on_ranks(followed, 1)[0] == [True] * 2
