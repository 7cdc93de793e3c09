"""The page's figures in words: headline, held-out table, attempts, incidents."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from typing import Any

from ..monitor.attempts import Attempt
from ..monitor.progress import duration
from .run import Run

INCIDENTS = 200
"""Incidents listed at most; the newest ones."""

ABSENT = "–"

_BLOCK = re.compile(r"(?P<shard>shard .+), block (?P<block>\d+ at byte \d+): (?P<reason>.+)")
"""A damaged block as :attr:`data_pipeline.damage.Damage.place` names it."""


@dataclass(frozen=True)
class State:
    """How the run stands: ``kind`` (a CSS class) is ``good``, ``paused``, ``unknown`` or ``bad``."""

    kind: str
    label: str
    detail: str


@dataclass(frozen=True)
class Tile:
    """One figure of the headline; ``exact`` is its value with full precision."""

    label: str
    value: str
    detail: str = ""
    exact: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell; ``exact`` is shown on hovering."""

    text: str
    exact: str = ""
    kind: str = ""


def state(run: Run, now: float) -> State:
    """How the run stands, judged by its last attempt."""
    if not run.attempts:
        return State("unknown", "no attempt recorded", "")
    last = run.attempts[-1]
    if last.reason is None:
        seen = run.last_seen or last.started
        return State(
            "unknown", "running or killed", f"last sign of life {moment(seen)} UTC ({_ago(now - seen)} before)"
        )
    kind, label = {
        "done": ("good", "finished"),
        "stopped": ("paused", f"stopped by {last.signal}" if last.signal else "stopped on request"),
        "user_error": ("bad", "stopped: configuration or data"),
        "crash": ("bad", "crashed"),
        "non_finite": ("bad", "stopped: not finite"),
        "unstable": ("bad", "stopped: losses too high"),
        "rolled_back": ("paused", "went back to a checkpoint"),
    }[last.reason]
    when = f"{moment(last.stopped or last.started)} UTC"
    return State(kind, label, f"{when}: {last.message}" if kind == "bad" and last.message else when)


def tiles(run: Run) -> list[Tile]:
    """The headline; a figure the files don't hold is left out."""
    last = run.steps[-1] if run.steps else {}
    total = run.total_steps
    step = Tile("step", f"{run.last_step:,}")
    if total:
        step = Tile("step", f"{run.last_step:,} / {total:,}", f"{min(1.0, run.last_step / total):.1%}")
    shown = [step]
    if isinstance(tokens := last.get("tokens"), int):
        shown.append(Tile("tokens", _short(tokens), f"{last.get('position', 0):,} sequences", f"{tokens:,}"))
    if _number(loss := last.get("loss")):
        shown.append(Tile("training loss", f"{loss:.4f}", f"{run.loss_unit} per token, last line", repr(loss)))
    for name, line in _last_evaluations(run).items():
        detail = [f"perplexity {line['perplexity']:.2f}"] if _number(line.get("perplexity")) else []
        detail += [f"{line['bits_per_byte']:.4f} bits/byte"] if _number(line.get("bits_per_byte")) else []
        detail += [f"accuracy {line['accuracy']:.2%}"] if _number(line.get("accuracy")) else []
        if _number(line.get("loss")):
            shown.append(Tile(f"{name} loss", f"{line['loss']:.4f}", ", ".join(detail), repr(line["loss"])))
    speed = run.column("tokens_per_second")[1]
    if speed:
        utilisation, median = run.column("mfu")[1], statistics.median(speed)
        basis = f"median; MFU {statistics.median(utilisation):.1%}" if utilisation else "median"
        shown.append(Tile("tokens per second", _short(median), basis, repr(median)))
    waits, times = run.column("data_wait_seconds")[1], run.column("step_seconds")[1]
    if waits and sum(times):
        shown.append(Tile("data wait", f"{sum(waits) / sum(times):.2%}", "of the step time"))
    spent = [seconds for attempt in run.attempts if (seconds := run.seconds_of(attempt)) is not None]
    if spent:
        attempts = f"{len(run.attempts)} attempt{'s' if len(run.attempts) > 1 else ''}"
        shown.append(Tile("time", duration(sum(spent)), attempts, f"{sum(spent):.1f} s"))
    if _number(imbalance := last.get("experts/imbalance")):
        detail = [f"{last['experts/dead']:,} dead"] if "experts/dead" in last else []
        special = last.get("experts/specialization")
        detail += [f"specialization {special:.3f}"] if _number(special) else []
        shown.append(Tile("busiest expert", f"{imbalance:.2f} × mean", ", ".join(detail), repr(imbalance)))
    if "skipped" in last or "holes" in last:
        counts = f"{last.get('skipped', 0):,} / {last.get('holes', 0):,}"
        shown.append(Tile("skipped / holes", counts, "steps / sequences"))
    if last.get("weights/dropped"):
        shown.append(Tile("dropped", f"{last['weights/dropped']:,}", "sequences without a finite loss"))
    return shown


def heldout_rows(run: Run) -> list[list[Cell]]:
    """Set, domain, loss, perplexity, bits per byte, lowest loss with its step; from each set's last line."""
    rows = []
    for name, line in _last_evaluations(run).items():
        domains = sorted(key.removeprefix("domain_loss/") for key in line if key.startswith("domain_loss/"))
        keys = [("all", "{}")] + [(domain, "domain_{}/" + domain) for domain in domains]
        for domain, pattern in keys:
            past = [other for other in run.evaluations if other["evaluation"] == name]
            key = pattern.format("loss")
            finite = [(other[key], other["step"]) for other in past if _number(other.get(key), finite=True)]
            best = Cell(f"{min(finite)[0]:.4f} at {min(finite)[1]:,}", repr(min(finite)[0])) if finite else Cell(ABSENT)
            figures = [
                _figure(line.get(pattern.format(kind)), digits)
                for kind, digits in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4))
            ]
            left_out = f", heldout_holes {line['heldout_holes']}" if line.get("heldout_holes") else ""
            which = str(line.get("heldout_damage") or "")
            rows.append([Cell(f"{name}, step {line['step']:,}{left_out}", which), Cell(domain), *figures, best])
    return rows


def attempt_rows(run: Run) -> list[list[Cell]]:
    """Number, start, duration, ranks and hosts, steps, resumed from, why it ended, lost steps."""
    rows = []
    for attempt in run.attempts:
        seconds = run.seconds_of(attempt)
        lost = run.lost_steps(attempt)
        last = f"{attempt.last_step:,}" if attempt.last_step is not None else "?"
        hosts = f"{attempt.world_size:,} on {attempt.hosts[0] if len(attempt.hosts) == 1 else len(attempt.hosts)}"
        took = "" if seconds is None else ("" if attempt.stopped else "≥ ") + duration(seconds)
        rows.append(
            [
                Cell(str(attempt.number)),
                Cell(moment(attempt.started)),
                Cell(took or ABSENT, "" if seconds is None else f"{seconds:.1f} s"),
                Cell(hosts + (" hosts" if len(attempt.hosts) != 1 else ""), ", ".join(attempt.hosts)),
                Cell(f"{attempt.first_step:,} to {last}" if attempt.trained else "none"),
                Cell(*_began(attempt)),
                _ended(run, attempt),
                Cell(ABSENT if lost is None else f"{lost:,}", "", "bad" if lost else ""),
            ]
        )
    return rows


def _began(attempt: Attempt) -> tuple[str, str]:
    """What it went on from, and the hash of weights from elsewhere."""
    weights, masks = attempt.initial_weights, attempt.masks
    anew = "a fresh start" if attempt.trained else "ended before its first step"
    said = f"the weights of {weights['path']}" if weights else attempt.resumed_from or anew
    said += "".join(f", masked by {each['path']}" for each in masks)
    return said, "; ".join(f"SHA-256 {each['sha256']}" for each in ([weights] if weights else []) + list(masks))


def versions(run: Run) -> list[tuple[str, str]]:
    """The versions that ran, each with the stretch of attempts that ran them."""
    stretches: list[tuple[str, str]] = []
    for found, group in groupby(run.attempts, key=attrgetter("versions")):
        numbers = [attempt.number for attempt in group]
        which = f"Attempt {numbers[0]}" if len(numbers) == 1 else f"Attempts {numbers[0]} to {numbers[-1]}"
        stretches.append((which, ", ".join(f"{name} {version}" for name, version in sorted(found.items())) or ABSENT))
    return stretches


@dataclass(frozen=True)
class Incident:
    """An event of the run; for damage of a shard, all the blocks and steps that it was met in."""

    first_step: int
    last_step: int
    time: float | None
    kind: str
    details: str


@dataclass
class _Damage:
    """Damage of one kind that one shard has shown so far."""

    first_step: int
    blocks: dict[str, None] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    holes: int = 0

    def told(self, shard: str, reason: str) -> str:
        if len(self.blocks) == 1:
            where = f"{shard}, block {next(iter(self.blocks))}"
        else:
            where = f"{shard}, {len(self.blocks):,} blocks, the first met {next(iter(self.blocks))}"
        return f"{where}: {reason}; {self.counted}"

    @property
    def counted(self) -> str:
        sequences = f"{self.holes:,} sequence{'s' if self.holes != 1 else ''}"
        return sequences + (f" in {len(self.steps):,} steps" if len(self.steps) > 1 else "")


def incidents(run: Run) -> list[Incident]:
    """The incidents in the order in which each was met last."""
    found: dict[Any, Incident] = {}
    met: dict[tuple[str, str], _Damage] = {}
    for number, line in enumerate(run.events):
        rest = {key: value for key, value in line.items() if key not in ("event", "step", "time", "message")}
        message, first = str(line.get("message") or ""), line["step"]
        details = [message] if message else []
        key: Any = number
        if line["event"] == "damage" and message and isinstance(holes := rest.pop("new_holes", None), int):
            block = _BLOCK.fullmatch(message)
            key = (block["shard"], block["reason"]) if block else (message, "")
            damage = met.setdefault(key, _Damage(first))
            damage.steps.add(line["step"])
            damage.holes += holes
            first = damage.first_step
            if block:
                damage.blocks[block["block"]] = None
                details = [damage.told(*key)]
            else:
                details.append(damage.counted)
            found.pop(key, None)
        details += [f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in rest.items()]
        kind = str(line["event"]).replace("_", " ")
        found[key] = Incident(first, line["step"], line.get("time"), kind, "; ".join(details) or ABSENT)
    return list(found.values())


def incident_rows(found: list[Incident]) -> list[list[Cell]]:
    """Step, time of the last, kind and what else is known of the newest :data:`INCIDENTS`, oldest first."""
    rows = []
    for incident in found[-INCIDENTS:]:
        first, last = f"{incident.first_step:,}", f"{incident.last_step:,}"
        when = ABSENT if incident.time is None else moment(incident.time)
        step = first if first == last else f"{first} to {last}"
        rows.append([Cell(step), Cell(when), Cell(incident.kind), Cell(incident.details)])
    return rows


def _ended(run: Run, attempt: Attempt) -> Cell:
    if attempt.reason is None and attempt is run.attempts[-1]:
        return Cell("no stop recorded: running or killed", "", "unknown")
    kind = {"done": "good", "stopped": "paused", "rolled_back": "paused"}.get(attempt.reason or "", "bad")
    return Cell(": ".join(text for text in (attempt.ended, attempt.message) if text), f"exit {attempt.exit_code}", kind)


def _last_evaluations(run: Run) -> dict[str, dict[str, Any]]:
    return {str(line["evaluation"]): line for line in sorted(run.evaluations, key=lambda line: line["step"])}


def _figure(value: Any, digits: int) -> Cell:
    return Cell(f"{value:,.{digits}f}", repr(value)) if _number(value) else Cell(ABSENT)


def _number(value: Any, finite: bool = False) -> bool:
    return isinstance(value, int | float) and (not finite or math.isfinite(value))


def _short(value: float) -> str:
    sizes: Iterable[tuple[float, str]] = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
    for size, suffix in sizes:
        if value >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def moment(seconds: float) -> str:
    """A Unix time as date and time of day in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _ago(seconds: float) -> str:
    return duration(max(0.0, seconds))
