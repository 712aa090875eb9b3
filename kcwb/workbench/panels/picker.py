"""Menus to choose from: a relation with its templates and facts, or two relations that chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kcwb.errors import choose
from kcwb.tasks.compose import Composition, compose, compositions
from kcwb.tasks.relations import Fact, Relation, load_relation, relation_files
from kcwb.workbench.panels.widgets import Group, brief, dropdown, numbered, offer

if TYPE_CHECKING:
    from kcwb.workbench.panels.base import Panel


class Picker(Group):
    """Menus for a relation, one of its templates and one of its facts: each relation brings its own.

    Parameters
    ----------
    panel
        Whose menus they are.
    relation
        What to start with: the name of a packaged relation, a file's path, or a Relation.
    template
        The number of one of its zero-shot templates, or one of the caller's own, which is offered beside them; None
        for a panel that has no use for it.
    subject
        The fact to start with; by default the relation's first.
    on_change
        Called after another relation or another fact was chosen.

    Attributes
    ----------
    relations
        What can be chosen, by name: relations, or the files that hold them.
    relation, template, fact
        The menus; a panel shows those that it has a use for.

    Raises
    ------
    DataError, SettingError
        If the relation cannot be read, or has no such fact or template.
    """

    def __init__(
        self,
        panel: Panel,
        relation: Relation | str | Path,
        *,
        template: int | str | None = 0,
        subject: str | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        given = relation if isinstance(relation, Relation) else load_relation(relation)
        if template is not None:
            given.template(template)
        subjects = [fact.subject for fact in given.facts]
        row = 0 if subject is None else subjects.index(choose(f"The subject in {given.name}", subject, subjects))
        self.relations: dict[str, Relation | Path] = {**relation_files(), given.name: given}
        self.relation = dropdown("Relation", self._names(), given.name, least=400)
        self.template = dropdown("Template", [], None, least=400)
        self.fact = dropdown("Fact", [], None, least=400)
        self._offer(given, template, row)

        def another_relation(_: object) -> None:
            with panel._silently():
                self._offer(self.chosen)
                on_change()

        panel._on(self.relation, another_relation)
        panel._on(self.fact, lambda _: on_change())
        panel._adopt(self)

    @property
    def chosen(self) -> Relation:
        """The relation on screen."""
        return self.read(str(self.relation.value))

    @property
    def chosen_fact(self) -> Fact:
        """The fact on screen."""
        return self.chosen.facts[int(self.fact.value or 0)]

    @property
    def number(self) -> int:
        """Which of the relation's templates is on screen."""
        return int(self.template.value or 0)

    @property
    def wording(self) -> str:
        """The template on screen."""
        return self.chosen.template(self.template.value or 0)

    @property
    def settings(self) -> dict[str, str]:
        """What is on screen: `relation`, `template`, `subject` and `object`."""
        fact = self.chosen_fact
        names = {"relation": self.chosen.name, "template": self.wording}
        return {**names, "subject": fact.subject, "object": fact.object}

    def read(self, name: str) -> Relation:
        """A relation by its name."""
        source = self.relations[name]
        return source if isinstance(source, Relation) else load_relation(source)

    def _names(self) -> list[tuple[str, str]]:
        """All relations by category."""
        kinds = {
            name: source.relation_type if isinstance(source, Relation) else source.parent.name
            for name, source in self.relations.items()
        }
        return [(brief(f"{kind}: {name}"), name) for kind, name in sorted((kind, name) for name, kind in kinds.items())]

    def _offer(self, relation: Relation, template: int | str | None = None, row: int = 0) -> None:
        own = [(brief(template), template)] if isinstance(template, str) else []
        offer(self.template, [*numbered(relation.prompt_templates_zs), *own], template)
        offer(self.fact, numbered(f"{fact.subject} → {fact.object}" for fact in relation.facts), row)


class ChainPicker(Group):
    """Menus for two relations of which the second is asked about the first one's objects, and for the question.

    Parameters are those of `HopPanel`; `first`, `second` and `template` are also the menus.
    """

    def __init__(
        self, panel: Panel, first: Relation | Composition | str, second: Relation | str, *, template: int
    ) -> None:
        self._given = given = first if isinstance(first, Composition) else compose(first, second)
        given.wording(template)
        packaged = compositions(least=1)
        self._pairs = {str(one): list(some) for one, some in packaged.groupby("first", sort=True)["second"]}
        seconds = self._pairs.setdefault(given.first.name, [])
        if given.second.name not in seconds:
            seconds.append(given.second.name)
        self.first = dropdown("First", [(brief(name), name) for name in self._pairs], given.first.name)
        self.second = dropdown("Second", self._seconds(), given.second.name)
        self.template = dropdown("Question", self._wordings(), template, least=400)

        def another(menu: str) -> None:
            with panel._silently():
                if menu == "first":
                    offer(self.second, self._seconds())
                offer(self.template, self._wordings())

        panel._on(self.first, lambda _: another("first"))
        panel._on(self.second, lambda _: another("second"))
        panel._adopt(self)

    @property
    def chosen(self) -> Composition:
        """The two relations on screen."""
        names, given = (str(self.first.value), str(self.second.value)), self._given
        return given if names == (given.first.name, given.second.name) else compose(*names)

    @property
    def number(self) -> int:
        """Which of the questions is on screen."""
        return int(self.template.value or 0)

    def _seconds(self) -> list[tuple[str, str]]:
        return [(brief(name), name) for name in self._pairs[str(self.first.value)]]

    def _wordings(self) -> list[tuple[str, int]]:
        return numbered(wording.template for wording in self.chosen.wordings)
