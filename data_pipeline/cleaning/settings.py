"""The configuration of cleaning: one optional section a stage, all off by default."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..settings import Settings
from .c4 import C4Settings
from .decontaminate import DecontaminateSettings
from .near_duplicates import NearDuplicatesSettings
from .normalise import NormaliseSettings
from .quality import QualitySettings
from .repetition import RepetitionSettings


class CleaningSettings(Settings):
    """The stages, in the order in which they are applied. A stage is on when its section is there: ``quality: {}``."""

    normalise: NormaliseSettings | None = Field(default=None, description="Character normalisation.")
    quality: QualitySettings | None = Field(default=None, description="Gopher's quality rules, and lengths.")
    repetition: RepetitionSettings | None = Field(default=None, description="Gopher's repetition rules.")
    c4: C4Settings | None = Field(default=None, description="C4's whole-document rules.")
    decontaminate: DecontaminateSettings | None = Field(default=None, description="Keep evaluation texts out.")
    exact_duplicates: bool = Field(
        default=False, description="Keep one of the documents with equal text, over all sources and domains."
    )
    near_duplicates: NearDuplicatesSettings | None = Field(
        default=None, description="Keep one of the documents with nearly equal text, over all sources and domains."
    )
    rejected_characters: int = Field(
        default=1000,
        ge=0,
        description="Characters of each rejected document's text to keep in the side files; 0: none of it.",
    )

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other."""
        return self.exact_duplicates or self.near_duplicates is not None

    @property
    def of_documents(self) -> dict[str, Any]:
        """The settings of the stages that look at one document at a time (JSON)."""
        others = {"exact_duplicates", "near_duplicates", "rejected_characters"}
        return self.model_dump(mode="json", exclude=others)
