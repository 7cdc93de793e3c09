"""Character normalisation: the only stage that changes a text. Normalising twice is normalising once.

The steps, in this order, each a setting:

1. ``control``: removed are the C0 and C1 control characters and DEL but for tab and the line ends of step 2; the
   byte-order mark U+FEFF wherever it stands; the invisible characters that change no meaning (soft hyphen U+00AD,
   zero-width space U+200B, word joiner U+2060 and U+2061-U+2064, Mongolian vowel separator U+180E, interlinear
   annotation U+FFF9-U+FFFB); and the noncharacters U+FDD0-U+FDEF, U+nFFFE, U+nFFFF. Kept are the joiners U+200C and
   U+200D and the direction marks, which scripts need, and U+FFFD, which tells of an earlier damage.
2. ``line_ends``: CR LF, CR, vertical tab, form feed, NEL U+0085 and LS U+2028 become LF; PS U+2029 becomes two LF.
3. ``form``: the Unicode normalisation form (UAX 15). NFC joins letters and their marks and changes no look; NFKC also
   replaces compatibility characters (ligatures, full-width letters, superscripts), which loses what they said.
4. ``spaces``: Unicode's space separators (category Zs: U+00A0, U+2000-U+200A, U+3000 ...) become U+0020.
5. ``collapse_blanks``: a run of spaces and tabs inside a line becomes one space; those that begin a line stay, since
   they indent.
6. ``trailing_blanks``: spaces and tabs at the end of a line, and all line ends at both ends of the text, are removed.
7. ``max_blank_lines``: of a longer run of blank lines this many stay, empty.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from pydantic import Field

from ..settings import Settings

_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_CONTROL_CLASS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb" + _NONCHARACTERS
)
_LINE_END_CLASS = "\r\x0b\x0c\x85\u2028\u2029"
_SPACE_CLASS = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_CONTROL = re.compile(f"[{_CONTROL_CLASS}]+")
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028]")
_SPACE = re.compile(f"[{_SPACE_CLASS}]")
_ANY_OF_THEM = re.compile(f"[{_CONTROL_CLASS}{_LINE_END_CLASS}{_SPACE_CLASS}]")
_ANY_ASCII = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_INNER_BLANKS = re.compile(r"(?<=[^ \t\n])(?:[ \t]{2,}|\t)")
_TRAILING_BLANKS = re.compile(r"[ \t]+\n")


class NormaliseSettings(Settings):
    """Character normalisation; what each step does stands in the module's docstring."""

    form: Literal["NFC", "NFKC", "none"] = Field(
        default="NFC", description="Unicode normalisation form; NFC is what UAX 15 recommends for text interchange."
    )
    control: bool = Field(default=True, description="Remove control characters, byte-order marks, invisible ones.")
    line_ends: bool = Field(default=True, description="Make every line end a line feed.")
    spaces: bool = Field(default=True, description="Make every Unicode space separator U+0020.")
    collapse_blanks: bool = Field(
        default=False, description="One space for a run of blanks inside a line. Off: it destroys tables and code."
    )
    trailing_blanks: bool = Field(
        default=True, description="Remove blanks at the ends of lines and line ends at the ends of the text."
    )
    max_blank_lines: int | None = Field(
        default=2, ge=0, description="Blank lines that stay of a longer run of them; null: all. 2 is this project's."
    )


class Normaliser:
    """Applies :class:`NormaliseSettings` to texts."""

    def __init__(self, settings: NormaliseSettings) -> None:
        self._settings = settings
        self._blank_lines: re.Pattern[str] | None = None
        if settings.max_blank_lines is not None:
            self._kept_ends = "\n" * (settings.max_blank_lines + 1)
            self._blank_lines = re.compile(rf"\n(?:[ \t]*\n){{{len(self._kept_ends)},}}")

    def __call__(self, text: str) -> str:
        """``text``, normalised; may be empty."""
        settings = self._settings
        if (_ANY_ASCII if text.isascii() else _ANY_OF_THEM).search(text):
            if settings.control:
                text = _CONTROL.sub("", text)
            if settings.line_ends:
                text = _LINE_END.sub("\n", text).replace("\u2029", "\n\n")
        if not text.isascii():
            if settings.form != "none":
                text = unicodedata.normalize(settings.form, text)
            if settings.spaces:
                text = _SPACE.sub(" ", text)
        if settings.collapse_blanks:
            text = _INNER_BLANKS.sub(" ", text)
        if settings.trailing_blanks:
            if " \n" in text or "\t\n" in text:
                text = _TRAILING_BLANKS.sub("\n", text)
            text = text.rstrip(" \t\n").lstrip("\n")
        if self._blank_lines is not None:
            text = self._blank_lines.sub(self._kept_ends, text)
        return text
