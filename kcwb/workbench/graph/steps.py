"""Step by step what is cut and forced in, to be undone and done again; and a `Play` led there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kcwb.errors import DataError, SettingError

if TYPE_CHECKING:
    from kcwb.evaluation.play import Play

_MOST = 1000  # steps that are undone


class Steps:
    """What was cut and what was forced in, before and after where we are."""

    def __init__(self) -> None:
        self._now: tuple[list[str], list[str]] = ([], [])
        self.past: list[tuple[list[str], list[str]]] = []
        self.future: list[tuple[list[str], list[str]]] = []

    def take(self, cut: Sequence[str], forced: Sequence[str]) -> None:
        """One step further, unless that is where we are: it was undone, or is the other half of one step."""
        now = (list(cut), list(forced))
        if now != self._now:
            self.past.append(self._now)
            del self.past[:-_MOST]
            self.future.clear()
            self._now = now

    def go(self, steps: int) -> tuple[list[str], list[str]]:
        """Go so many steps forth, or back if negative, as far as there are; what is cut and forced in there."""
        back, forth = (self.past, self.future) if steps < 0 else (self.future, self.past)
        for _ in range(min(abs(steps), len(back))):
            forth.append(self._now)
            self._now = back.pop()
        cut, forced = self._now
        return list(cut), list(forced)

    def forget(self) -> None:
        """Begin here."""
        self.past.clear()
        self.future.clear()


def lead(
    play: Play, cut: Sequence[str], forced: Sequence[str], question: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Lead a Play to what is cut and forced in, and give what is answered then, as `CircuitGraph.answers` takes it.

    What is wrong with a question stands in the answers, under ``own``.
    """
    if not (set(play.cuts) == set(cut) and set(play.forced) == set(forced)):
        play.go_to(cut=cut, forced=forced)
    trouble = {}
    if not _is_asked(play, question):
        play.own = None
        try:
            if question:
                play.ask(**question)
        except (DataError, SettingError) as error:
            trouble = {"own": {**question, "problem": str(error)}} if question else {}
    return play.as_traits() | trouble


def led(play: Play, cut: Sequence[str], forced: Sequence[str], question: Mapping[str, str]) -> bool:
    """Whether a Play is there, and was asked that."""
    return set(play.cuts) == set(cut) and set(play.forced) == set(forced) and _is_asked(play, question)


def _is_asked(play: Play, question: Mapping[str, str] | None) -> bool:
    return (play.own.question if play.own else {}) == {name: text for name, text in (question or {}).items() if text}
