"""The stages that look at one document at a time, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..sources import Document
from .c4 import C4Filter
from .decontaminate import Decontaminator
from .normalise import Normaliser
from .quality import QualityFilter
from .repetition import RepetitionFilter
from .settings import CleaningSettings
from .view import Finding, TextView


@dataclass(frozen=True)
class Rejection:
    """A document that a stage keeps out of the data set.

    Attributes:
        stage: the key of the stage in :class:`CleaningSettings`.
        reason: the rule, or the evaluation file: what is counted.
        detail: the measured value and its limit, or the n-gram in common.
        url: where the document came from.
        text: its text, normalised if normalisation is on, whole.
    """

    stage: str
    reason: str
    detail: str
    url: str
    text: str


class Cleaner:
    """Normalises and checks documents. Build one per process: decontamination reads its files then.

    Attributes:
        ignored_evaluation_texts: how many are too short to be looked for.

    Raises:
        UserError: evaluation files are missing or unreadable.
    """

    def __init__(self, settings: CleaningSettings) -> None:
        self._normalise = Normaliser(settings.normalise) if settings.normalise else None
        filters: dict[str, Callable[[TextView], Finding | None]] = {}
        self.ignored_evaluation_texts = 0
        if settings.quality:
            filters["quality"] = QualityFilter(settings.quality)
        if settings.repetition:
            filters["repetition"] = RepetitionFilter(settings.repetition)
        if settings.c4:
            filters["c4"] = C4Filter(settings.c4)
        if settings.decontaminate:
            filters["decontaminate"] = decontaminator = Decontaminator(settings.decontaminate)
            self.ignored_evaluation_texts = decontaminator.ignored
        self._filters = filters

    def clean(self, document: Document) -> Document | Rejection:
        """The document to keep, normalised, or why it goes. An empty text is no matter of cleaning: it comes back."""
        if self._normalise:
            document = replace(document, text=self._normalise(document.text))
        if not document.text:
            return document
        view = TextView(document.text)
        for stage, check in self._filters.items():
            if finding := check(view):
                return Rejection(stage, finding.reason, finding.detail, document.url, document.text)
        return document
