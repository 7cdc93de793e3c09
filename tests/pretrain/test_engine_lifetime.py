"""Engines one after another in one process."""

from __future__ import annotations

import gc
import sys
import weakref

from tests.ranks import run_on_ranks

from .steps import VOCABULARY, tiny_config


def followed() -> tuple[list[bool], list[bool]]:
    """Whether an engine that nobody holds is gone when the next one asks DeepSpeed for its own. At the stages where it
    can go: at 2 and 3 DeepSpeed's hooks hold it for as long as the process lives. And whether garbage collections look
    through what was imported, and whether torch's compiler is part of it."""
    from pretrain.distributed import start
    from pretrain.engine import Engine
    from pretrain.engine.deepspeed_module import import_deepspeed

    deepspeed = import_deepspeed()
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
    return gone, [gc.get_freeze_count() < 100_000, "torch._inductor.compile_fx" in sys.modules]


def test_an_engine_dies_before_the_next_one_imports_and_starts_with_little() -> None:
    """Its finalizer imports: within an import of the next one that is a KeyError of Python's import locks."""
    ((gone, costs),) = run_on_ranks(followed, 1)
    assert gone == [True] * 2
    assert costs == [False, False]
