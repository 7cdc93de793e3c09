"""Ranks that are slower than the others at what they do alone: named, for the others only wait."""

from __future__ import annotations

import socket
import statistics

from .config import ResilienceSettings
from .distributed import Distributed
from .monitor import MetricLine

LEAST_SECONDS = 0.001
"""Slower by less than this is nothing."""


class Stragglers:
    """Compares the ranks' own times: of the forward pass, and of waiting for data.

    In both a rank waits for no other, so that the slow rank's is long and not everybody's. (At ZeRO stage 3 a forward
    pass gathers parameters, and with experts on several ranks it exchanges tokens: there only waiting for data is
    looked at.)

    Args:
        settings: how much slower is too slow, and how often to look.
        ranks: this process among its peers.
        forward_alone: whether a forward pass communicates with nobody.
    """

    def __init__(self, settings: ResilienceSettings, ranks: Distributed, forward_alone: bool) -> None:
        self._settings = settings
        self._ranks = ranks
        self._names = {"forward pass": forward_alone, "waiting for data": True}
        self._sums = [0.0, 0.0]
        self._steps = 0

    def add(self, step: int, forward: float, waited: float) -> list[MetricLine]:
        """Count a step: seconds of one forward pass, and of waiting for data. Collective where it is time to look.

        Returns:
            an event for each rank and kind of work that is out of line; the same on every rank.
        """
        every = self._settings.straggler_every
        if every is None or self._ranks.world_size == 1:
            return []
        self._sums, self._steps = [self._sums[0] + forward, self._sums[1] + waited], self._steps + 1
        if step % every:
            return []
        own = [seconds / self._steps for seconds in self._sums]
        self._sums, self._steps = [0.0, 0.0], 0
        found = self._ranks.gather_objects((socket.gethostname(), own))
        events: list[MetricLine] = []
        for number, (work, alone) in enumerate(self._names.items()):
            seconds = [each[number] for _, each in found]
            usual = statistics.median_low(seconds)
            for rank, (host, each) in enumerate(found):
                limit = max(self._settings.straggler_ratio * usual, usual + LEAST_SECONDS)
                if alone and each[number] > limit:
                    message = (
                        f"rank {rank} on {host}: {work} takes {each[number]:.4g} s, the ranks' median {usual:.4g} s"
                    )
                    events.append({"event": "straggler", "step": step, "message": message, "rank": rank, "host": host})
        return events
