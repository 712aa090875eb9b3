"""A circuit as a widget that is played: what a person does in the page is what the traits hold, and the reverse.

The page is the instrument (`kcwb.workbench.graph.instrument`), by the contract of anywidget: JupyterLab, Notebook 7,
VS Code. Whatever a trait is set to is checked (`kcwb.workbench.graph.state`): from Python, nonsense raises in one line
and the old value stays; from the page it becomes `problem`, which is shown in the widget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import traitlets as T

from kcwb.errors import CircuitError, KcwbError, SettingError, nearest
from kcwb.settings import Count
from kcwb.verbs import verb
from kcwb.workbench.graph.drawing import Drawing, Look, Roles, draw, draw_two
from kcwb.workbench.graph.instrument import module, scene
from kcwb.workbench.graph.kept import NONE, Kept
from kcwb.workbench.graph.sessions import two_sessions
from kcwb.workbench.graph.state import CHECKS, checked, kept_of
from kcwb.workbench.graph.steps import Steps, lead, led

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble
    from kcwb.circuits.session import Session
    from kcwb.evaluation.play import Play

_MOST = 20_000  # edges
_PYTHONS = ("scene", "height", "live", "busy", "asks")
_SESSION = ("pinned", "groups", "names", "notes", "cut", "forced")


class CircuitGraph(Kept):
    """A circuit, drawn and played: select, cut, restore, force in, undo, pin, group, name, note, explain.

    All of it by mouse or keyboard in the widget (`?` shows the keys), and from Python by its traits, which
    `graph.observe(function, "cut")` follows. Without a kernel, in a saved notebook or a report, the picture stays and
    can be looked at.

    Parameters
    ----------
    circuit : Circuit or Ensemble, optional
        What is drawn; of an ensemble its consensus at one half. None for an empty widget, see `show`.
    roles, title, details, ensemble, max_edges
        As in `kcwb.graph_view`.
    height : int
        In pixels.
    **traits
        What else to start with, for example ``pinned=["a3.h1"]``.

    Attributes
    ----------
    selected, pinned : list of str
        Nodes.
    selected_edges : list of str
        Edges, ``"sender->receiver"``.
    cut, forced : list of str
        Edges of the circuit that are cut out of it; edges of the graph that are forced into it.
    groups : dict of str to list of str
        Group -> its nodes; each is drawn as one box until a double click opens it.
    names, notes : dict of str to str
        Node -> what a person calls it, and has to say of it.
    threshold : float
        Edges of less |score| are hidden (of two circuits: of a smaller share of the largest).
    confidence : float
        Edges that a smaller share of draws keeps are hidden.
    answers : dict
        What is shown beside the graph, as `kcwb.Play.as_traits` gives it: ``facts``, each with ``prompt``,
        ``answer``, ``before`` and ``after`` (``p``, ``rank``, ``top``: tokens with probabilities), and ``loss_before``,
        ``loss_after``; of a prompt of one's own ``own``.
    question : dict of str to str
        A prompt of one's own that is asked after each step, too: ``prompt``, ``subject``, ``answer``, of which only the
        first must be there. Empty: none.
    asks : bool
        Whether such prompts are answered: by `play`, or a panel.
    reading : dict
        What is read of a ``node``, beside the graph while it is selected: ``runs``, each with the name of its ``run``
        and its ``prompts``, as `kcwb.workbench.graph.reading.read_node` gives them. Panels fill it.
    paths : list of list of str
        Paths that are lit, in order, each a list of nodes.
    busy : bool
        Whether `answers` are being computed.
    problem : str
        One line about what went wrong, shown in the widget.
    asked : str
        What the page asks Python for, ``"undo"``, ``"redo"`` or ``"explain"``; empty once it is done.
    view : dict
        What the page shows at the moment, for `save`: the window (``width``, ``height``, ``left``, ``top``, ``scale``,
        ``stretch``, pixels), what the legend has ``hidden``, groups that are ``open``, and ``pinned_only``,
        ``layered``, ``dark``.

    Raises
    ------
    SettingError, CircuitError, traitlets.TraitError
        If something cannot be meant, or names what the circuit has not.

    Examples
    --------
    >>> graph = kcwb.CircuitGraph(circuit)  # doctest: +SKIP
    >>> graph.play(kcwb.Play(model, circuit, task))  # doctest: +SKIP
    >>> graph.cut = ["a14.h5->logits"]; graph.answers["loss_after"]  # doctest: +SKIP
    """

    _esm = module()

    scene = T.Dict().tag(sync=True)
    live = T.Bool(True, read_only=True).tag(sync=True)
    height = T.Int(640).tag(sync=True)
    selected = T.List().tag(sync=True)
    selected_edges = T.List().tag(sync=True)
    pinned = T.List().tag(sync=True)
    cut = T.List().tag(sync=True)
    forced = T.List().tag(sync=True)
    groups = T.Dict().tag(sync=True)
    names = T.Dict().tag(sync=True)
    notes = T.Dict().tag(sync=True)
    threshold = T.Float(0.0).tag(sync=True)
    confidence = T.Float(0.0).tag(sync=True)
    answers = T.Dict().tag(sync=True)
    question = T.Dict().tag(sync=True)
    asks = T.Bool(False).tag(sync=True)
    reading = T.Dict().tag(sync=True)
    paths = T.List().tag(sync=True)
    busy = T.Bool(False).tag(sync=True)
    problem = T.Unicode("").tag(sync=True)
    asked = T.Unicode("").tag(sync=True)
    view = T.Dict().tag(sync=True)

    @verb
    def __init__(
        self,
        circuit: Circuit | Ensemble | None = None,
        *,
        roles: Roles | None = None,
        title: str | None = None,
        details: Mapping[str, str] | None = None,
        ensemble: Ensemble | None = None,
        max_edges: Count = _MOST,
        height: Count = 640,
        **traits: Any,
    ) -> None:
        for name in traits:
            if name not in {*CHECKS, "layout"}:
                raise SettingError(f"CircuitGraph has no {name!r}. {nearest(name, CHECKS)}")
        self._circuit: Circuit | None = None
        self._play: Play | None = None
        self._steps, self._places = Steps(), {}
        super().__init__(height=height, **({"layout": traits.pop("layout")} if "layout" in traits else {}))
        if circuit is not None:
            self.show(circuit, roles=roles, title=title, details=details, ensemble=ensemble, max_edges=max_edges)
        for name, value in traits.items():
            setattr(self, name, value)
        self._steps.forget()

    # --- what is drawn ---

    @property
    def circuit(self) -> Circuit | None:
        """The circuit that is drawn, as it was given; of two, their union."""
        return self._circuit

    @property
    def session(self) -> Session:
        """What a person has done; ``graph.circuit.with_session(graph.session).save(path)`` keeps it with the circuit.

        Raises
        ------
        CircuitError
            If there is no circuit yet.
        """
        from kcwb.circuits.session import Session, session_of

        if self._circuit is None:
            raise CircuitError(NONE)
        return session_of(self._circuit, Session(**{name: getattr(self, name) for name in _SESSION}))

    @property
    def played(self) -> Circuit:
        """The circuit as it is now, without what is cut and with what is forced in.

        Raises
        ------
        CircuitError
            If there is no circuit yet.
        """
        from kcwb.circuits.session import played

        session = self.session
        assert self._circuit is not None
        return played(self._circuit, session)

    @verb
    def show(
        self,
        circuit: Circuit | Ensemble,
        *,
        roles: Roles | None = None,
        title: str | None = None,
        details: Mapping[str, str] | None = None,
        ensemble: Ensemble | None = None,
        max_edges: Count = _MOST,
    ) -> None:
        """Draw another circuit in place.

        If it has a session (`Circuit.with_session`), that is taken up. Else names, notes, groups, pins and cuts stay as
        far as they can be said of it. Undoing starts anew.

        Parameters
        ----------
        circuit, roles, title, details, ensemble, max_edges
            As in `kcwb.graph_view`.
        """
        from kcwb.circuits.ensemble import Ensemble

        drawing = draw(circuit, Look(roles, max_edges, title, details, ensemble))
        self._take(drawing, circuit.consensus() if isinstance(circuit, Ensemble) else circuit)

    @verb
    def compare(
        self,
        left: Circuit,
        right: Circuit,
        *,
        names: Sequence[str] = ("left", "right"),
        roles: Roles | None = None,
        title: str | None = None,
        details: Mapping[str, str] | None = None,
        max_edges: Count = _MOST,
    ) -> None:
        """Draw two circuits of one model in one picture, in place; parameters as in `compare_view`."""
        self._take(draw_two(left, right, names, Look(roles, max_edges, title, details)), left | right)

    @verb
    def compare_sessions(
        self,
        circuit: Circuit,
        left: Session,
        right: Session,
        *,
        names: Sequence[str] = ("left", "right"),
        roles: Roles | None = None,
        title: str | None = None,
    ) -> None:
        """Draw what two people did to one circuit, in place; parameters as in `compare_sessions_view`."""
        drawing, both, state = two_sessions(circuit, left, right, names, Look(roles, _MOST, title, None))
        self._take(drawing, both)
        for name, value in state.items():
            setattr(self, name, value)

    def _take(self, drawing: Drawing, circuit: Circuit) -> None:
        held = {name: getattr(self if circuit.session is None else circuit.session, name) for name in _SESSION}
        kept = kept_of(held, circuit)
        self.asks &= self._play is None
        self._circuit, self._drawing, self._play = circuit, drawing, None
        fresh = {"selected": [], "selected_edges": [], "answers": {}, "reading": {}, "paths": [], "threshold": 0.0}
        with self.hold_sync():
            for name, value in {**fresh, **kept, "problem": "", "scene": scene(drawing)}.items():
                setattr(self, name, value)
        self._steps.forget()

    # --- what is played ---

    @verb
    def play(self, play: Play) -> None:
        """Show beside the graph what the circuit answers, and again after each step.

        Parameters
        ----------
        play
            Of the circuit that is drawn; it is led to what is cut and forced in here.

        Raises
        ------
        CircuitError
            If it is of another circuit.
        """
        if self._circuit is None or not play.given.kept.equal(self._circuit.kept):
            raise CircuitError("This Play is of another circuit than the one that is drawn; show that one first.")
        self._play, self.asks = play, True
        self._answer()

    @verb
    def undo(self, steps: Count = 1) -> None:
        """Take back the last steps that changed `cut` or `forced`; those that there are."""
        self._go(-steps)

    @verb
    def redo(self, steps: Count = 1) -> None:
        """Take such steps again."""
        self._go(steps)

    def _go(self, steps: int) -> None:
        cut, forced = self._steps.go(steps)
        with self.hold_sync(), self.hold_trait_notifications():
            self.cut, self.forced = cut, forced

    @T.observe("cut", "forced", "question")
    def _on_step(self, change: Any) -> None:
        self._steps.take(self.cut, self.forced)
        if self._play is not None:
            self._answer()

    def _answer(self) -> None:
        play = self._play
        if play is None or (self.answers and led(play, self.cut, self.forced, self.question)):
            return
        self.busy = True
        try:
            self.answers = lead(play, self.cut, self.forced, self.question)
        except KcwbError as error:
            self.problem = str(error)
        finally:
            self.busy = False

    @T.observe("asked")
    def _on_asked(self, change: Any) -> None:
        """Do what the page asks for, once everybody else has heard of it, too."""
        asked = change["new"]
        if not asked:
            return
        try:
            if asked == "explain":
                self.explain()
            else:
                {"undo": self.undo, "redo": self.redo}[asked]()
        except KcwbError as error:
            self.problem = str(error)
        finally:
            self.asked = ""

    @verb
    def explain(self, k: Count = 10) -> None:
        """Light the strongest paths of the circuit as it is now, through the selected node if there is one.

        Parameters
        ----------
        k
            How many; see `kcwb.circuits.strongest_paths`.
        """
        from kcwb.circuits.paths import strongest_paths

        inner = [name for name in self.selected if name not in ("input", "logits")]
        table = strongest_paths(self.played, k, through=inner[0] if len(inner) == 1 else None)
        paths = [["input", *(edge.partition("->")[2].partition("<")[0] for edge in edges)] for edges in table["edges"]]
        self.paths = list({tuple(path): path for path in paths}.values())
        if not paths:
            self.problem = "No path leads from input to logits here."

    # --- what is refused ---

    @T.validate(*CHECKS)
    def _validate(self, proposal: Any) -> Any:
        try:
            return checked(proposal["trait"].name, proposal["value"], self._circuit)
        except (SettingError, CircuitError) as error:
            raise T.TraitError(str(error)) from None

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take what the page sends; what cannot be meant becomes `problem`, and the page gets the old value back."""
        good, wrong = {}, []
        for name, value in sync_data.items():
            try:
                if name in _PYTHONS:
                    raise SettingError(f"{name} is for Python to set.")
                if name in CHECKS:
                    getattr(type(self), name).validate(self, value)
                    checked(name, value, self._circuit)
                good[name] = value
            except (SettingError, CircuitError, T.TraitError) as error:
                wrong.append((name, str(error)))
        super().set_state(good)
        if wrong:
            self.send_state([name for name, _ in wrong])
            self.problem = wrong[0][1]
        elif self.problem and "problem" not in good:
            self.problem = ""
