"""Playing with a circuit, against running each circuit anew."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.masked import ChangingRun, MaskedRuns
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.evaluation.play import Play
from kcwb.interventions.nodes import ablate_nodes
from kcwb.models.network import Network
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.own import own_prompt
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.tasks import known_relation, prompt_ids
from tests.tiny import tiny_model

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "qwen3"]
EDGES = ["input->a0.h1<v>", "a0.h1->m0", "a0.h1->a1.h2<q>", "m0->a1.h2<v>", "a1.h2->logits", "m0->logits"]


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    """Of a tiny graph a few edges are many: run none by the pass that computes everything."""
    monkeypatch.setattr("kcwb.circuits.masked._FEW", 0.5)


def task_of(model, n=4):
    return make_task(model, known_relation(model, 9), n=n)


@pytest.fixture
def play(tiny):
    """Six edges of a tiny model, with a group."""
    model = tiny("llama")
    return Play(model, Circuit.from_edges(model.graph, EDGES), task_of(model), groups={"middle": ["m0", "a1.h2"]})


def expected(play, cuts=None):
    """The logits of the circuit as it is now, by a run of its own."""
    cuts = cuts or make_ablation(play.model, None, "zero")
    return run_circuit(play.model, play.circuit.kept, play.prompts, cuts)


def is_as_it_was(play, before):
    return (play.steps, play.cuts, play.forced, play.as_traits()) == before


def state(play):
    return play.steps, play.cuts, play.forced, play.as_traits()


def a_step(play, draw):
    """One random step that is allowed, by names of edges and nodes."""
    graph = play.model.graph
    given, now = play.given.kept, play.circuit.kept
    edges = {"cut": now, "restore": given & ~now, "force": graph.exists & ~now}
    what = draw.choice([name for name, mask in edges.items() if mask.any()])
    row, column = draw.choice(edges[what].nonzero().tolist())
    edge, nodes = graph.edge_name(row, column), (graph.sender_names[row], graph.receiver_names[column].split("<")[0])
    name = draw.choice([edge, edge, nodes[0], nodes[1]]) if what != "force" else edge
    getattr(play, what)(name)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_of_sixty_random_steps_is_the_run_of_its_circuit(tiny, name, ablation):
    model, draw = tiny(name), random.Random(0)
    task = task_of(model)
    cuts = make_ablation(model, task, ablation)
    play = Play(model, random_circuit(model.graph, 14, 1), task, ablation=ablation)
    for i in range(60):
        if i % 7 == 6:
            play.undo(draw.randint(1, len(play.steps)))
        elif i % 7 == 0 and play.undone:
            play.redo(draw.randint(1, len(play.undone)))
        else:
            a_step(play, draw)
        torch.testing.assert_close(play._after, expected(play, cuts), rtol=0, atol=0)


@pytest.mark.parametrize("few", [0.0, 1.0])  # all in one dense pass, or none
def test_a_changing_run_is_a_run_of_its_own_at_any_density(tiny, few, monkeypatch):
    monkeypatch.setattr("kcwb.circuits.masked._FEW", few / 2)
    model, seed = tiny("gpt2"), torch.Generator().manual_seed(0)
    runs = MaskedRuns(model.network, task_of(model).val, None)
    run = ChangingRun(runs)
    for share in (0.05, 0.3, 0.3, 0.9, 1.0, 0.0, 0.2):
        kept = (torch.rand(model.graph.exists.shape, generator=seed) < share) & model.graph.exists
        for _ in range(2):  # the same again, too
            torch.testing.assert_close(run.logits(kept), runs.logits(kept), rtol=0, atol=0)


def note_runs(monkeypatch, ran):
    """Of the class: a method that is patched on a network stays one of its own, and its copies call it."""
    for name in ("queries", "mlp"):
        own = getattr(Network, name)
        monkeypatch.setattr(
            Network,
            name,
            lambda self, layer, *a, own=own, **k: ran.append((own.__name__, layer)) or own(self, layer, *a, **k),
        )


def test_layers_before_the_first_change_are_not_run_again(tiny, monkeypatch):
    model, ran = tiny("llama"), []
    edges = [*EDGES, "input->m1", "a0.h1->m1", "m1->logits"]
    play = Play(model, Circuit.from_edges(model.graph, edges), task_of(model))
    note_runs(monkeypatch, ran)
    play.cut("a0.h1->m1")
    assert ran == [("mlp", 1)]
    play.cut("m0->logits")  # what m0 writes matters as before: its value is read at all positions
    assert ran[1:] == []
    play.restore("m0->logits")
    play.cut("m0->a1.h2<v>")
    assert ("mlp", 0) in ran  # now it matters at the answers alone


def test_nodes_that_a_change_does_not_reach_are_not_run_again_and_what_is_undone_is_remembered(tiny, monkeypatch):
    model, ran = tiny("llama"), []
    edges = ["input->a0.h1<v>", "a0.h1->m1", "input->m0", "m0->a1.h2<v>", "a1.h2->logits", "m1->logits", "input->m1"]
    play = Play(model, Circuit.from_edges(model.graph, edges), task_of(model))
    note_runs(monkeypatch, ran)
    play.cut("input->m0")  # reached are m0 and a1.h2
    assert ran == [("mlp", 0), ("queries", 1)]
    play.undo()
    assert ran[2:] == []
    play.cut("input->a0.h1<v>")  # reached are a0.h1 and m1
    assert ran[2:] == [("queries", 0), ("mlp", 1)]


def test_a_step_that_is_cancelled_leaves_all_as_it_was(play, monkeypatch):
    before = state(play)
    monkeypatch.setattr(Network, "logits", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play.cut("m0")
    monkeypatch.undo()
    assert is_as_it_was(play, before)
    play.cut("m0")
    torch.testing.assert_close(play._after, expected(play), rtol=0, atol=0)


# --- names ---


def test_a_node_stands_for_all_edges_at_it_and_a_group_for_those_of_its_nodes(play):
    play.cut("m0")
    assert sorted(play.cuts) == sorted(["a0.h1->m0", "m0->a1.h2<v>", "m0->logits"])
    play.restore("m0->logits")
    assert sorted(play.cuts) == sorted(["a0.h1->m0", "m0->a1.h2<v>"])
    play.undo(2)
    play.cut("middle")
    assert play.circuit.edges["receiver"].tolist() == ["a0.h1<v>"]


def test_an_edge_to_a_head_stands_for_those_to_its_query_key_and_value(play):
    play.force("a0.h1->a1.h2")
    assert play.forced == ["a0.h1->a1.h2<k>", "a0.h1->a1.h2<v>"]
    play.cut("a0.h1->a1.h2")
    assert play.cuts == ["a0.h1->a1.h2<q>"] and play.forced == []


def test_a_node_is_forced_in_where_the_circuit_is(play):
    play.force("m1")
    assert play.forced == ["input->m1", "a0.h1->m1", "m0->m1", "a1.h2->m1", "m1->logits"]
    play.undo()
    play.set_groups({"pair": ["a0.h0", "m1"]})
    play.force("pair")
    assert "a0.h0->m1" in play.forced and "a0.h2->m1" not in play.forced


def test_an_edge_that_was_cut_comes_back_by_force_and_is_not_told_as_forced(play):
    play.cut("m0->logits")
    play.force("m0->logits")
    assert play.cuts == play.forced == [] and play.circuit is play.given


@pytest.mark.parametrize(
    ("what", "name", "said"),
    [
        ("cut", "a9.h1", "cut: 'a9.h1' is not known. Did you mean 'a1.h1'"),
        ("cut", "midle", "cut: 'midle' is not known. Did you mean 'middle'"),
        ("cut", "m0->a1.h9<q>", "cut: 'a1.h9<q>' in 'm0->a1.h9<q>' is not known. Did you mean 'a1.h"),
        ("cut", "m0->m1", "cut: 'm0->m1' is not in the circuit."),
        ("cut", "m1", "cut: 'm1' is not in the circuit."),
        ("cut", "a1.h2->logits", "cut: 'a1.h2->logits' is cut already."),
        ("cut", "a1.h2->m0", "cut: there is no edge a1.h2->m0: a1.h2 is not computed before m0 reads."),
        ("cut", "logits->m0", "cut: 'logits' in 'logits->m0' is not known."),
        ("restore", "m0", "restore: 'm0' is not cut."),
        ("restore", "m1", "restore: 'm1' was not in the circuit."),
        ("force", "m0->logits", "force: 'm0->logits' is in the circuit already."),
        ("force", "m1->m0", "force: there is no edge m1->m0"),
        ("force", "x" * 10**6, "force: 'xxx"),
        ("force", "\u202e<script>", "force: '\\u202e<script>' is not known."),
    ],
)
def test_a_step_that_cannot_be_is_refused_in_one_line_and_changes_nothing(play, what, name, said):
    play.cut("a1.h2->logits")
    play.force("input->m0")
    play.undo()
    before, undone = state(play), play.undone
    with pytest.raises(CircuitError) as caught:
        getattr(play, what)("input->a0.h0<v>" if what == "force" else "input->a0.h1<v>", name)
    text = str(caught.value)
    if what == "restore":
        assert "'input->a0.h1<v>' is not cut." in text  # the first name is told first
        with pytest.raises(CircuitError) as caught:
            play.restore("a1.h2->logits", name)
        text = str(caught.value)
    assert text.startswith(said) and "\n" not in text and len(text) < 300
    assert is_as_it_was(play, before) and play.undone == undone


def test_a_step_names_something_and_steps_that_are_not_there_are_not_undone(play):
    with pytest.raises(SettingError, match="cut: name at least one"):
        play.cut()
    with pytest.raises(CircuitError, match=r"undo: 0 steps can be undone, not 1\."):
        play.undo()
    with pytest.raises(CircuitError, match=r"redo: 0 steps can be made again, not 2\."):
        play.redo(2)
    with pytest.raises(SettingError, match="undo: steps=0"):
        play.undo(0)


@pytest.mark.parametrize(("groups", "said"), [({"m0": ["m1"]}, "name of a node"), ({"g": []}, "no nodes")])
def test_a_group_has_a_name_of_its_own_and_nodes(play, groups, said):
    with pytest.raises(CircuitError, match=said):
        play.set_groups(groups)
    with pytest.raises(CircuitError, match=r"group 'g': 'm7' is not known\. Did you mean"):
        play.set_groups({"g": ["m7"]})
    assert list(play.groups) == ["middle"]


# --- history ---


def test_undo_gives_bit_equal_answers_and_redo_too(play):
    states, draw = [state(play)], random.Random(1)
    for _ in range(120):
        a_step(play, draw)
        states.append(state(play))
    for before in states[-11::-10]:
        play.undo(10)
        assert is_as_it_was(play, before)
    play.redo(120)
    assert is_as_it_was(play, states[-1])
    play.undo()
    assert is_as_it_was(play, states[-2]) and len(play.undone) == 1


def test_a_new_step_takes_the_place_of_what_was_undone(play):
    play.cut("m0")
    play.cut("a0.h1")
    play.undo(2)
    play.cut("m0->logits", "input->a0.h1<v>")
    assert play.steps == ["cut m0->logits, input->a0.h1<v>"] and play.undone == []


# --- what is told ---


def test_answers_are_those_of_the_table_of_ablated_nodes(play):
    """Its table says the same of the circuit without a node, by code of its own."""
    play.cut("m0")
    told = play.answers()
    table = ablate_nodes(play.model, play.given, task_of(play.model), ["m0"], ablation="zero", progress=False).query(
        "run == 'circuit' and split == 'D_val'"
    )
    for name in ("before", "after"):
        rows = table[table["state"] == name]
        assert told["prompt"].tolist() == rows["prompt"].tolist()
        assert told[f"rank_{name}"].tolist() == rows["rank"].tolist()
        assert told[f"probability_{name}"].tolist() == pytest.approx(rows["probability"].tolist(), rel=1e-4)
    nll = table.groupby("state")["loss"].mean()
    assert play.loss.before == pytest.approx(nll["before"], rel=1e-4)
    assert play.loss.after == pytest.approx(nll["after"], rel=1e-4)


def test_the_likeliest_tokens_and_the_full_models_loss_are_those_of_the_runs(play):
    play.cut("m0->logits")
    logits = expected(play)[:, 0].softmax(-1)
    for row, p in zip(play.answers(3)["top_after"], logits, strict=True):
        best = p.argsort(descending=True)[:3]
        assert [token for token, _ in row] == [play.model.tokenizer.decode([int(t)]) for t in best]
        assert [value for _, value in row] == pytest.approx(p[best].tolist())
    full = run_circuit(play.model, None, play.prompts, make_ablation(play.model, None, "zero"))
    assert play.loss.model == pytest.approx(float(make_loss(play.model, play.prompts)(full)))


def test_traits_are_json_and_say_what_the_table_says(play):
    play.cut("m0->logits")
    traits = json.loads(json.dumps(play.as_traits(2), allow_nan=False))
    assert list(traits) == ["facts", "loss_before", "loss_after", "loss_model"]
    table = play.answers(2)
    for fact, row in zip(traits["facts"], table.to_dict("records"), strict=True):
        assert (fact["prompt"], fact["answer"]) == (row["prompt"], row["answer"])
        assert fact["after"] == {"p": row["probability_after"], "rank": row["rank_after"], "top": row["top_after"]}
        assert fact["before"]["rank"] == row["rank_before"] and len(fact["before"]["top"]) == 2
    assert traits["loss_after"] == play.loss.after != traits["loss_before"]


# --- a prompt of one's own ---


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_of_ones_own_is_answered_as_by_runs_of_it(tiny, name, ablation):
    model, text = tiny(name), "w80 w3 w9 w9 w9 w9 w81 w82"  # longer than the task's prompts
    task = task_of(model)
    cuts, none = make_ablation(model, task, ablation), make_ablation(model, None, "zero")
    play = Play(model, Circuit.from_edges(model.graph, EDGES), task, ablation=ablation)
    play.ask(f" {text} ", subject="w3", answer="w40 w7")
    corrupted = play.own.prompts.facts[0].corrupted
    prompts = encode(model, [Fact(text, "w40 w7", corrupted=corrupted, span=(4, 6))], "{}", ["w40 w7"])
    for field in ("tokens", "lengths", "answers", "decides", "ranks", "subject_start", "subject_stop"):
        assert torch.equal(getattr(play.own.prompts, field), getattr(prompts, field)), field
    for step in (None, "m0", "a0.h1->a1.h2"):
        if step:
            play.cut(step)
        own = play.as_traits()["own"]
        runs = {"before": (play.given, cuts), "after": (play.circuit.kept, cuts), "model": (None, none)}
        for run, (circuit, delivers) in runs.items():
            p = run_circuit(model, circuit, prompts, delivers)[0, 0].softmax(-1)
            answer = int(prompts.answers[0, 0])
            assert own[run]["p"] == pytest.approx(float(p[answer]), rel=1e-5)
            assert own[run]["rank"] == int((p >= p[answer]).sum())
            assert [value for _, value in own[run]["top"]] == pytest.approx(p.topk(5).values.tolist(), rel=1e-5)
    table = play.ask(text, subject="w3", answer="w40 w7").set_index("run")
    assert table["probability"].to_dict() == {run: own[run]["p"] for run in ("before", "after", "model")}
    assert table.attrs["delivers"] == own["delivers"]
    assert not torch.equal(cuts.values(prompts), torch.zeros(())) if ablation != "zero" else True


def test_a_subject_is_where_it_stands_as_a_whole_word(tiny):
    """Not in w10, which begins with its letters; nor is a partner one whose other right answer is the answer."""
    model = tiny("llama")
    others = [Fact("w3", "w41", also=("w40",)), Fact("w4", "w42")]
    prompts = own_prompt(model, "w80 w1 w10", subject="w1", answer="w40", others=others)
    assert (int(prompts.subject_start[0]), int(prompts.subject_stop[0])) == (1, 2)
    assert prompts.facts[0].named == "w1" and prompts.facts[0].corrupted == "w80 w4 w10"
    assert not own_prompt(model, "w80 x1", subject="x1", others=[Fact("x2", "w41")]).paired.any()  # both unknown


def test_an_answer_that_is_left_out_is_what_the_model_says(play):
    table = play.ask("w80 w3 w9").set_index("run")
    assert table.at["model", "rank"] == 1 and table.at["model", "top"][0][0] == table.at["model", "answer"]
    best = play.model.logits(torch.tensor([prompt_ids(play.model, "w80 w3 w9")]))[0, -1].argmax()
    assert table.at["before", "answer"] == play.model.tokenizer.decode([int(best)])


def test_what_cut_edges_deliver_on_it_is_said(tiny):
    model = tiny("llama")
    task, circuit = task_of(model), Circuit.from_edges(model.graph, EDGES)
    short, long = "w80 w3 w81", " ".join(["w80", *["w9"] * 30])
    words = {
        kind: Play(model, circuit, task, ablation=kind).ask(short, subject="w3").attrs["delivers"] for kind in ABLATIONS
    }
    assert words["zero"] == "A cut edge delivers nothing."
    assert words["mean"].endswith("at the same place counted from the end.")
    play = Play(model, circuit, task, ablation="mean")
    _, classes = make_ablation(model, task, "mean").fitted
    back = -int(classes.offsets.min())
    assert play.ask(long).attrs["delivers"].endswith(f"the mean {back} tokens back.")
    values = make_ablation(model, task, "mean").values(play.own.prompts)
    assert torch.equal(values[:, 0, 1], values[:, 0, -1 - back]) and not torch.equal(values[:, 0, 1], values[:, 0, -1])
    own = Play(model, circuit, task, ablation="resample")
    own.ask(short, subject="w3")
    other = own.own.prompts.facts[0].corrupted
    assert words["resample"] == f"A cut edge delivers what its sender writes on “{other}”."
    assert own.own.prompts.corrupted[0].tolist() == prompt_ids(model, other) != own.own.prompts.tokens[0].tolist()


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"prompt": "  "}, "The prompt is empty. Type what the model is to go on with."),
        ({"prompt": "w1 w2", "subject": "w7"}, "The subject 'w7' does not stand in the prompt in these letters."),
        ({"prompt": "w10 w2", "subject": "w1"}, "The subject 'w1' does not stand in the prompt as a whole word."),
        ({"prompt": "w1 " * 70}, r"The prompt has 7\d tokens; .* reads 64\."),
        ({"prompt": "w1 w2"}, "resample ablation needs the prompt with another subject in it: say the subject."),
        ({"prompt": "w1 w2 w3 w4 w5", "subject": "w1 w2 w3 w4 "}, "no other subject .* in the place of 'w1 w2 w3 w4'"),
        ({"prompt": 5}, "ask: prompt=5 is not text"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line_and_what_was_asked_stays(tiny, question, said):
    model = tiny("llama")
    play = Play(model, Circuit.from_edges(model.graph, EDGES), task_of(model), ablation="resample")
    play.ask("w80 w3 w81", subject="w3")
    before = play.as_traits()
    with pytest.raises((SettingError, DataError), match=said) as caught:
        play.ask(**question)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert play.as_traits() == before


def test_the_circuit_says_what_a_person_did(play, tmp_path):
    play.cut("m0->logits")
    play.force("input->m0")
    circuit = play.circuit
    assert circuit.provenance["method"] == "played"
    played = circuit.provenance["played"]
    assert played["cut"] == ["m0->logits"] and played["forced"] == ["input->m0"]
    assert played["circuit"]["digest"] == play.given.digest
    circuit.save(tmp_path / "played.json")
    assert Circuit.load(tmp_path / "played.json").provenance["played"] == played
    again = Play(play.model, circuit, task_of(play.model))
    again.cut("input->m0")
    assert again.circuit.provenance["played"]["circuit"]["played"] == played


def test_facts_are_the_first_of_d_val_or_any_prompts(tiny):
    model = tiny("llama")
    task, circuit = task_of(model), Circuit.from_edges(model.graph, EDGES)
    assert Play(model, circuit, task, facts=2).prompts.texts == task.val.texts[:2]
    mean = make_ablation(model, task, "mean")
    assert Play(model, circuit, task.test, ablation=mean).as_traits()["facts"][0]["prompt"] == task.test.texts[0]
    with pytest.raises(SettingError, match="mean ablation averages over a task's prompts"):
        Play(model, circuit, task.test, ablation="mean")
    with pytest.raises(DataError, match="no fact to ask"):
        Play(model, circuit, task.val.select([]))
    with pytest.raises(CircuitError, match="The circuit is part of"):
        Play(tiny_model("llama", num_hidden_layers=3), circuit, task)


def test_prompts_in_parts_are_answered_alike(play, monkeypatch):
    monkeypatch.setattr("kcwb.models.memory.memory_budget", lambda device: 0)
    parts = Play(play.model, play.given, task_of(play.model))
    for one in (play, parts):
        one.cut("m0->logits")
    torch.testing.assert_close(parts._after, play._after, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_edited_ends_the_play(play, monkeypatch):
    monkeypatch.setattr(play, "_digest", "other")
    with pytest.raises(CircuitError, match=r"weights of .* have changed"):
        play.cut("m0")
    with pytest.raises(CircuitError, match=r"weights of .* have changed"):
        play.ask("w80 w3")


# --- sessions ---


def test_a_play_begins_where_the_circuits_session_ends_and_can_take_it_back(play, tmp_path):
    play.cut("m0->logits")
    play.force("input->m0")
    path = tmp_path / "circuit.json"
    play.given.with_session(replace(play.session, pinned=["m0"])).save(path)
    circuit = Circuit.load(path)
    again = Play(play.model, circuit, task_of(play.model))
    assert (again.cuts, again.forced, again.groups) == (["m0->logits"], ["input->m0"], {"middle": ("m0", "a1.h2")})
    assert again.as_traits() == play.as_traits()
    assert again.session == replace(circuit.session, cut=("m0->logits",)) and again.session.pinned == ("m0",)
    again.undo()
    assert again.circuit is again.given and again.loss.after == again.loss.before


def test_one_step_leads_to_any_state(play):
    play.cut("m0")
    play.go_to(cut=["input->a0.h1<v>", "m0->logits"], forced=["input->m0"])
    assert sorted(play.cuts) == ["input->a0.h1<v>", "m0->logits"] and play.forced == ["input->m0"]
    torch.testing.assert_close(play._after, expected(play), rtol=0, atol=0)
    before = state(play)
    for wrong in ({"cut": ["input->m0"]}, {"forced": ["m0->logits"]}, {"cut": ["m9"]}, {"forced": ["m1->m0"]}):
        with pytest.raises(CircuitError):
            play.go_to(**wrong)
    assert is_as_it_was(play, before)
    play.go_to()
    assert play.circuit is play.given and len(play.steps) == 3


@pytest.mark.model
def test_on_the_builtin_model(smollm2, monkeypatch):
    """Steps in a circuit of some hundred edges, each the run of its circuit."""
    monkeypatch.setattr("kcwb.circuits.masked._FEW", 0.04)
    task = make_task(smollm2, "country_capital", n=2)
    play = Play(smollm2, random_circuit(smollm2.graph, 200, 0), task)
    names = play.circuit.edges["sender"] + "->" + play.circuit.edges["receiver"]
    for name in (names.iloc[0], names.iloc[-1]):
        play.cut(name)
        torch.testing.assert_close(play._after, expected(play), rtol=0, atol=0)
    play.undo(2)
    assert play.loss.after == play.loss.before != play.loss.model
