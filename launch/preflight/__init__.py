"""``pretrain-launch preflight``: what can be known before the allocation is checked before the allocation (law 8)."""

from __future__ import annotations

from collections.abc import Iterable

from data_pipeline.errors import UserError
from pretrain.config import Config, load_config
from pretrain.data import RunData

from . import cluster, run_checks
from .disk import check_disk
from .findings import Code, Finding, Request, refused
from .memory import check_memory

__all__ = ["Code", "Finding", "Request", "failed", "preflight", "show"]


def preflight(request: Request) -> list[Finding]:
    """All that is found about a run, errors first. Starts nothing and writes nothing."""
    try:
        config = load_config(request.path, request.overrides)
    except UserError as error:
        return [refused("configuration", error, "Mend the file, or the override.")]
    found: list[Finding] = list(run_checks.configuration(config, request))
    opened: list[RunData] = []
    if not failed(found):
        found += run_checks.data(config, request, opened)
        found += _of_opened(config, request, opened)
    found += cluster.check_time(config, request)
    found += cluster.check_slurm(request)
    found += run_checks.software()
    found += run_checks.needs_cuda(request)
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def _of_opened(config: Config, request: Request, opened: list[RunData]) -> Iterable[Finding]:
    """What needs the vocabulary: of the data set, or, where that is not there, of the configuration."""
    vocabulary = config.model.vocab_size
    if opened:
        vocabulary = config.model.resolve_vocab_size(opened[0].tokenizer.vocab_size)
        yield from run_checks.resume(config, request, opened[0])
    if vocabulary is not None:
        yield from check_memory(config, vocabulary, request)
        yield from check_disk(config, vocabulary, request)


def failed(findings: Iterable[Finding]) -> bool:
    """Whether one of them stops a submission."""
    return any(finding.severity == "error" for finding in findings)


def show(findings: Iterable[Finding]) -> str:
    """Findings for people, one a line."""
    return "\n".join(map(str, findings))
