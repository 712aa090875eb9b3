"""What a person has done to a circuit: checked against it, kept in its file, and never in the circuit's way."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.circuitfile import edges_digest
from kcwb.circuits.session import Session
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.models.graph import Graph
from tests.circuits.test_circuit import assert_same
from tests.hostile import HOSTILE, SURROGATE

GRAPH = Graph(2, 3)
EDGES = {"input->a0.h1<v>": 0.5, "a0.h1->m0": -0.25, "m0->a1.h2<q>": math.nan, "a1.h2->logits": 2.0}
WHOLE = Session(
    pinned=["a0.h1", "logits"],
    groups={"early": ["a0.h1", "m0"]},
    names={"m0": "enriches"},
    notes={"a1.h2": "mover?\nlook again"},
    cut=["a0.h1->m0"],
    forced=["input->logits"],
)


@pytest.fixture
def circuit():
    return Circuit.from_edges(GRAPH, EDGES, provenance={"method": "test"})


def changed(path, change):
    """A file whose session is changed, as by another tool."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["session"] = change(data["session"])
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def load_as_before(path):
    """What the reader did before there were sessions, by the keys that it read."""
    data = json.loads(path.read_bytes().decode("utf-8"))
    assert isinstance(data, dict) and data.get("format") == "kcwb-circuit/1"
    graph = Graph.of_file(**data["graph"])
    edges = {e["edge"]: math.nan if e["score"] is None else float(e["score"]) for e in data["edges"]}
    assert all(isinstance(name, str) for name in edges) and edges_digest(graph, sorted(edges)) == data["digest"]
    assert data["scores"] is None or isinstance(data["scores"], str)
    return Circuit.from_edges(graph, edges, provenance=dict(data["provenance"]))


# --- kept ---


def test_a_session_comes_back_as_it_was_saved(circuit, tmp_path):
    path = tmp_path / "circuit.json"
    given = circuit.with_session(WHOLE)
    given.save(path)
    found = Circuit.load(path)
    assert found.session == given.session == replace(WHOLE, circuit=circuit.digest)
    assert_same(found, given)
    found.save(path)  # and again
    assert Circuit.load(path).session == given.session
    found.with_session(None).save(path)
    assert Circuit.load(path).session is None and "session" not in json.loads(path.read_text(encoding="utf-8"))


def test_a_file_says_it_under_its_own_key_with_a_version(circuit, tmp_path):
    circuit.with_session(WHOLE).save(tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["session"]
    assert found["format"] == 1 and found["circuit"] == circuit.digest
    assert found["groups"] == {"early": ["a0.h1", "m0"]} and found["pinned"] == ["a0.h1", "logits"]


def test_an_older_reader_reads_the_circuit(circuit, tmp_path):
    path = tmp_path / "circuit.json"
    circuit.with_session(WHOLE).save(path)
    assert load_as_before(path).digest == circuit.digest
    circuit.save(path)
    assert Circuit.load(path).session is None  # and this one reads what that one wrote


@pytest.mark.parametrize("text", [*HOSTILE, SURROGATE, '"format": "kcwb-circuit/1"', "x" * 4000])
def test_hostile_text_stays_text(circuit, tmp_path, text):
    path = tmp_path / "circuit.json"
    try:
        session = Session(names={"m0": text[:120]}, notes={"m0": text}, groups={text[:120]: ["m0"]})
    except SettingError as error:  # what no file can hold
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    circuit.with_session(session).save(path)
    found = Circuit.load(path).session
    assert found is not None
    assert found.notes["m0"] == text and list(found.groups) == [text[:120]] and found.names["m0"] == text[:120]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: [], r"expected an object, found \[\]"),
        (lambda s: "x" * 10**5, "expected an object"),
        (lambda s: {**s, "format": 2}, "its format is 2, which this version does not read"),
        (lambda s: {k: v for k, v in s.items() if k != "format"}, "its format is None"),
        (lambda s: {**s, "circuit": "0" * 64}, "of the circuit '000000000000', not of this one"),
        (lambda s: {**s, "circuit": "\n\u202e" * 99}, "not of this one"),
        (lambda s: {**s, "circuit": ""}, "does not say of which circuit"),
        (lambda s: {**s, "circuit": None}, "does not say of which circuit"),
        (lambda s: {**s, "pinned": "m0"}, "pinned='m0' is not a list of: text"),
        (lambda s: {**s, "pinned": [["m0"]]}, "pinned="),
        (lambda s: {**s, "pinned": ["m9"]}, "pinned: there is no node 'm9'. Did you mean"),
        (lambda s: {**s, "groups": ["m0"]}, "groups="),
        (lambda s: {**s, "groups": {"g": "m0"}}, "groups="),
        (lambda s: {**s, "names": {"m0": 5}}, "names="),
        (lambda s: {**s, "names": {"m0": "x" * 10**5}}, "not text of at most 120 letters"),
        (lambda s: {**s, "cut": ["input->logits"]}, "cut: input->logits is not in the circuit"),
        (lambda s: {**s, "forced": ["a1.h2->logits"]}, "forced: a1.h2->logits is in the circuit"),
        (lambda s: {**s, "cut": ["->->" * 10**4]}, "cut: there is no edge"),
    ],
)
def test_a_damaged_session_is_left_out_with_a_warning_and_the_circuit_loads(circuit, tmp_path, change, said):
    path = tmp_path / "circuit.json"
    circuit.with_session(WHOLE).save(path)
    with pytest.warns(UserWarning, match="is left out: ") as caught:
        found = Circuit.load(changed(path, change))
    assert found.session is None
    assert_same(found, circuit)
    (text,) = [str(one.message) for one in caught]
    assert re.search(said, text) and "\n" not in text and len(text) < 500
    assert caught[0].filename == __file__


def test_what_a_later_version_adds_is_passed_over(circuit, tmp_path):
    path = tmp_path / "circuit.json"
    circuit.with_session(WHOLE).save(path)
    assert Circuit.load(changed(path, lambda s: {**s, "colours": {}})).session == circuit.with_session(WHOLE).session


# --- refused ---


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"pinned": ["a0.h7"]}, "pinned: there is no node 'a0.h7'. Did you mean 'a0.h"),
        ({"groups": {"g": ["m0", "mm"]}}, "groups, 'g': there is no node 'mm'."),
        ({"names": {"x" * 10**5: "?"}}, "names: there is no node 'xxx"),
        ({"notes": {"m7": "?"}}, "notes: there is no node 'm7'."),
        ({"cut": ["m0"]}, "cut: there is no edge 'm0'; they are written"),
        ({"cut": ["m0->m0"]}, "has no edge 'm0->m0'"),
        ({"cut": ["input->m0"]}, "cut: input->m0 is not in the circuit."),
        ({"forced": ["a0.h1->m0"]}, "forced: a0.h1->m0 is in the circuit."),
    ],
)
def test_a_session_names_what_the_circuit_has(circuit, parts, said):
    with pytest.raises(CircuitError) as caught:
        circuit.with_session(Session(**parts))
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"groups": {"a": ["m0"], "b": ["m0"]}}, "'m0' is in 'a' and in 'b'"),
        ({"groups": {"a": []}}, "'a' has no nodes"),
        ({"groups": {"": ["m0"]}}, "'' has no nodes, or no name"),
        ({"names": {"m0": "x" * 121}}, "not text of at most 120"),
        ({"notes": {"m0": "x" * 4001}}, "not text of at most 4000"),
        ({"pinned": "m0"}, "Session: pinned='m0' is not a list"),
    ],
)
def test_a_session_that_nobody_can_mean_is_refused(parts, said):
    with pytest.raises(SettingError, match=said):
        Session(**parts)


def test_a_session_of_another_circuit_is_refused(circuit):
    session = circuit.with_session(WHOLE).session
    other = Circuit.from_edges(GRAPH, [*EDGES, "m1->logits"])
    with pytest.raises(CircuitError, match=f"The session is of the circuit '{circuit.digest[:12]}', not of this one"):
        other.with_session(session)
    with pytest.raises(CircuitError, match="The session is of other edges"):
        replace(other, session=session)
    assert circuit.with_session(session).session == session


def test_a_circuit_made_of_another_has_no_session(circuit):
    given = replace(circuit, scores=circuit.scores.nan_to_num()).with_session(Session(pinned=["m0"]))
    assert resize(given, edges=1).session is None
    assert (given | given).session is None
    assert given.without_dangling().session == given.session  # nothing dangles
    dangling = Circuit.from_edges(GRAPH, [*EDGES, "input->a0.h0<k>"]).with_session(Session(pinned=["m0"]))
    assert dangling.without_dangling().session is None


def test_a_session_is_not_changed_by_what_it_was_made_of():
    pinned, groups = ["m0", "m0"], {"g": ["m0"]}
    session = Session(pinned=pinned, groups=groups)
    pinned.append("m1")
    groups["g"].append("m1")
    assert session.pinned == ("m0",) and session.groups == {"g": ("m0",)}


# --- compared ---


def test_two_sessions_are_compared_thing_by_thing(circuit):
    other = Session(
        pinned=["logits", "m1"], groups={"early": ["m0", "a0.h1"], "late": ["m1"]}, names={"m0": "enriches"},
        notes={"a1.h2": "mover!"}, cut=["a0.h1->m0"],
    )  # fmt: skip
    found = WHOLE.compare(other)
    assert list(map(tuple, found.to_numpy())) == [
        ("pinned", "a0.h1", "pinned", ""),
        ("pinned", "m1", "", "pinned"),
        ("groups", "early", "a0.h1, m0", "m0, a0.h1"),
        ("groups", "late", "", "m1"),
        ("notes", "a1.h2", "mover?\nlook again", "mover!"),
        ("forced", "input->logits", "forced", ""),
    ]
    assert WHOLE.compare(WHOLE).empty and list(WHOLE.compare(WHOLE)) == ["part", "what", "left", "right"]
    bound = circuit.with_session(WHOLE).session
    assert bound is not None and WHOLE.compare(bound)["part"].tolist() == ["circuit"]
    with pytest.raises(KcwbError, match="is not a Session"):
        WHOLE.compare("x")  # type: ignore[arg-type]
