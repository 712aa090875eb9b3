"""Is what a model has written the answer: compared as strings, by SQuAD's rules (arXiv 1606.05250).

QAEdit's code (arXiv 2502.11177) takes these where no language model judges: an answer ends with the first full stop or
end of line; lower case, no punctuation, no articles, single spaces; then it must be the same.
"""

from __future__ import annotations

import re
import string

#: Where an answer that a model writes ends.
STOPS = (".", "\n")


def words(text: str) -> list[str]:
    """The words of an answer that are compared."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def says(continuation: str, answer: str) -> tuple[bool, bool]:
    """Whether what a model has written, up to its first stop, is the answer, and whether it begins with it."""
    said = words(re.split("|".join(map(re.escape, STOPS)), continuation.strip(), maxsplit=1)[0])
    wanted = words(answer)
    return said == wanted, bool(wanted) and said[: len(wanted)] == wanted
