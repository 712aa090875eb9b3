"""Where a subject stands in a text: as whole words, never inside another ("Niger" is not in "Nigeria").

A word is a run of letters, marks and digits (Unicode's L, M and N), which a hyphen joins ("Guinea-Bissau"). Scripts
that are written without spaces do not mark where a word ends: beside their letters it may end anywhere but before a
mark; a run of Katakana is one word.
"""

from __future__ import annotations

import regex

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}"
_LETTER = rf"(?![{_SPACELESS}])[\p{{L}}\p{{N}}]"
#: Between two characters of one word: before a mark; between letters; beside a hyphen that joins letters.
_INSIDE = "|".join(
    (
        r"(?<=[\p{L}\p{M}\p{N}])(?=\p{M})",
        r"(?<=[\p{Katakana}ー]\p{M}*)(?=[\p{Katakana}ー])",
        rf"(?<={_LETTER}\p{{M}}*)(?=[-‐‑]?{_LETTER})",
        rf"(?<={_LETTER}\p{{M}}*[-‐‑])(?={_LETTER})",
    )
)


def places(text: str, subject: str) -> list[int]:
    """Where `subject` begins in `text` as whole words, not overlapping; an empty list where it does not."""
    whole = rf"(?!{_INSIDE})(?:{regex.escape(subject)})(?!{_INSIDE})"
    return [found.start() for found in regex.finditer(whole, text)]


def blank(text: str, subject: str) -> str | None:
    """`text` as a template, `{}` in place of the subject; None unless that stands in it once, as whole words."""
    found = places(text, subject)
    if len(found) != 1 or "{}" in text:
        return None
    return text[: found[0]] + "{}" + text[found[0] + len(subject) :]
