"""In-context learning: planted heads are found as new and needed, others are not; every number against a slow one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.selection import select_edges
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions.head_sets import answers_without
from kcwb.models.graph import Graph
from kcwb.models.loading import load_model
from kcwb.reading.nodes import ablate_nodes, attention_pattern
from kcwb.reading.roles import pattern_scores
from kcwb.statistics import matched_head_sets, mean_interval, proportion_interval
from kcwb.studies.in_context.heads import (
    ResampledCircuit,
    ablate_new,
    context_circuits,
    demonstration_attention,
    in_context,
    new_heads,
    reading_summary,
    shot_accuracy,
)
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.shots import GROUPS, make_shots, shot_tasks
from tests import handmade as H
from tests.tasks import known_relation, relation_of
from tests.tiny import tiny_model

N_HEADS, SIZE = 8, 128
FORMAT = ["a1.h3", "a2.h5"]
DECOYS = ["a1.h0", "a2.h2"]


def format_model():
    """A model that knows two objects of every subject and learns from demonstrations which of them is asked for.

    GPT-2, three layers of eight heads. a0.h1 copies both objects, a capital and a stronger language, from the last
    subject to END ("is"): its key reads the subject's flag and how near it is, by a cosine of positions. So without a
    shot the language is said, and the capital comes second. Capitals in the context hold a flag; a1.h3 and a2.h5
    attend to it from END and raise *all* capitals; either alone is enough, without both the language is said again.
    a1.h0 and a2.h2 are decoys: they attend alike and write where nobody reads.
    """
    shape = (SIZE, SIZE // N_HEADS)
    at = H._channels(
        SIZE, knows=16, says=16, unread=16, own=5, subject=1, end=1, capital=1, place=2, constant=2, filler=2
    )
    subjects, capitals, languages = (
        [f"{letter}{i}" for i in range(n)] for letter, n in (("s", 36), ("c", 8), ("l", 8))
    )
    fillers = [f"x{i}" for i in range(12)]
    words = ["is", *subjects, *capitals, *languages, *fillers]
    tokens = {word: i for i, word in enumerate(H._vocabulary(words))}
    module = H._gpt2(len(tokens), n_layers=3, n_heads=N_HEADS, at=at, size=SIZE)
    for weights in map(H._block, H._blocks(module)):
        for weight in weights:
            weight *= 0.3  # there are many distractors here
    n_ctx = 32
    module.config.n_positions = n_ctx
    module.transformer.wpe = torch.nn.Embedding(n_ctx, SIZE)
    embedding, places = torch.zeros(len(tokens), SIZE), torch.zeros(n_ctx, SIZE)
    angle = math.pi / n_ctx * torch.arange(n_ctx)
    places[:, at["place"]] = torch.stack([angle.cos(), angle.sin()], 1)
    embedding[tokens["is"], at["end"]] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], at["subject"]] = 1.0
        embedding[tokens[word], at["knows"][i % 8]] = 0.8
        embedding[tokens[word], at["knows"][8 + (i + 3) % 8]] = 1.0
    for word in capitals:
        embedding[tokens[word], at["capital"]] = 1.0
    embedding[:, at["own"]] = 0.15 * torch.randn(len(tokens), 5)

    def sharp(score: float) -> float:
        return math.sqrt(score * math.sqrt(shape[1]))

    near = H._map(shape, at["place"], [1, 2], sharp(120.0))
    mover: dict[str, Tensor] = {
        "q": H._map(shape, at["end"], [0], sharp(8.0)) + near,
        "k": H._map(shape, at["subject"], [0], sharp(8.0)) + near,
        "v": H._map(shape, at["knows"], range(16)),
        "o": H._map(shape, at["says"], range(16)).T,
    }
    H._write_head(module, 0, 1, **mover)
    raises = torch.zeros(shape[1], SIZE)
    raises[0, at["says"][:8]] = 0.4
    reader: dict[str, Tensor] = {
        "q": H._map(shape, at["end"], [0], sharp(6.0)),
        "k": H._map(shape, at["capital"], [0], sharp(6.0)),
        "v": H._map(shape, at["capital"], [0]),
    }
    unread = torch.zeros_like(raises)
    unread[0, at["unread"]] = 0.4
    for layer, head, out in ((1, 3, raises), (2, 5, raises), (1, 0, unread), (2, 2, unread)):
        H._write_head(module, layer, head, **reader, o=out)
    says = [tokens[word] for word in [*capitals, *languages]]
    H._write_ends(module, at, embedding, says=says, strength=7.0, places=places)
    facts = tuple(Fact(word, capitals[i % 8]) for i, word in enumerate(subjects))
    relation = Relation("capital", "handmade", "word", "word", False, ("{} is",), ("{} is",), facts)
    others = [
        Relation(f"filler {j}", "handmade", "word", "word", False, ("{} x0",), ("{} x0",),
                 tuple(Fact(f"x{i}", f"x{i + j}") for i in range(1, 7)))
        for j in range(1, 4)
    ]  # fmt: skip
    return load_model(module, H._tokenizer(words), device="cpu"), relation, others


@pytest.fixture(scope="module")
def planted():
    return format_model()


def study(planted, **more):
    model, relation, others = planted
    size = {"edges": 10, "steps": 2, "resamples": 30, "n": 8, "n_test": 16}
    return in_context(model, relation, 3, unrelated=others, progress=False, **{**size, **more})


@pytest.fixture(scope="module")
def found(planted):
    return study(planted, beside=[(3, "shuffled"), (3, "unrelated")])


# --- a head that matters, and one that does not ---


def test_shots_make_the_planted_model_answer_and_unrelated_text_does_not(found):
    hits = found.accuracy.set_index(["k", "kind"])["hit_1"]
    assert hits[0, "shots"] == 0 and hits[3, "unrelated"] == 0
    assert hits[3, "shots"] == 1 and hits[3, "shuffled"] == 1  # it learns which kind is asked for, not who has what


def test_the_planted_heads_are_new_and_the_mover_is_shared(found):
    assert found.named("new") == FORMAT and "a0.h1" in found.named("shared")
    assert not set(DECOYS) & set(found.named("new"))


def test_without_the_planted_heads_the_shots_are_lost_and_without_random_ones_not(found):
    table = found.ablation.set_index("arm")
    assert table.loc["intact", "hit_1"] == 1 and table.loc["new heads", "hit_1"] == 0
    assert table.loc["random heads", "hit_1"] > 0.95 and table.loc["shared heads", "hit_1"] < 0.5
    assert table.loc["new heads", "p_hit_1"] == pytest.approx(1 / 50)  # 7 x 7 sets are possible
    assert table.drop("new heads")["p_hit_1"].isna().all()


def test_a_head_that_does_not_matter_is_told_apart(planted, found):
    model, _, _ = planted
    table = ablate_new(model, found.tasks[3, "shots"], DECOYS, progress=False).set_index("arm")
    assert table["hit_1"]["new heads"] == 1 and table["p_hit_1"].to_dict()["new heads"] > 0.5


def test_the_planted_heads_read_the_demonstrated_objects(found):
    row = found.reading.set_index("quantity").T.to_dict()["object"]
    assert row["new heads"] > 0.9 > 0.5 > row["random heads"]
    assert row["p"] <= 0.2  # the decoys read them, too, and are drawn
    shares = found.heads.set_index("node")["object_share"].to_dict()
    assert min(shares[head] for head in FORMAT) > 0.9


def test_where_nothing_is_new_it_says_so(planted):
    """Three sentences about something else bring nothing, and there is nothing to ablate."""
    none = study(planted, kind="unrelated", edges=6, draws=5)
    assert none.named("new") == [] and none.named("shared") == ["a0.h1"]
    assert none.ablation["arm"].tolist() == ["intact", "shared heads"] and none.reading.empty


# --- the induction model ---


def test_the_induction_head_carries_what_a_demonstration_says():
    """Prompts ". b e f . a e": whatever came after e comes again. The model knows nothing without a shot."""
    model = H.induction().model
    facts = tuple(Fact(letter, "f") for letter in "abcd")
    relation = Relation("after e", "handmade", "word", "word", False, (". {} e",), (". {} e",), facts)
    task = make_shots(model, relation, 1, n=2, n_test=1, unrelated=[_letters()])
    table = ablate_new(model, task, ["a1.h3"], ["a0.h1"], split="val", progress=False).set_index("arm")
    assert table.loc["intact", "hit_1"] == 1 and table.loc["new heads", "hit_1"] == 0
    assert table.loc["shared heads", "hit_1"] == 0 and table.loc["random heads", "hit_1"] == 1
    assert table.loc["new heads", "p_hit_1"] == pytest.approx(1 / 5)  # the layer has four others
    heads = demonstration_attention(model, task, split="val").set_index("node")
    assert heads["object"].to_dict()["a1.h3"] > 0.9 and heads["induction"].idxmax() in ("a1.h3", "a1.h0")


def _letters() -> Relation:
    facts = tuple(Fact(*pair) for pair in ("gh", "hg"))
    return Relation("letters", "handmade", "word", "word", False, (". {}",), (". {}",), facts)


# --- ablated answers ---


@pytest.fixture(scope="module")
def made():
    """make("llama"): a tiny model, and a task of it."""
    known = {}

    def make(name: str):
        if name not in known:
            model = tiny_model(name)
            relation = replace(known_relation(model, 24), prompt_templates=("w1 {} w2",))
            known[name] = model, make_shots(model, relation, 2, n=4, n_test=6, sets=2, unrelated=[_filler()])
        return known[name]

    return make


def _filler() -> Relation:
    return replace(
        relation_of([Fact(f"u{i}", f"v{i}") for i in range(6)]), name="filler", prompt_templates=("u {} is",)
    )


SETS = [[], ["a1.h2"], ["a0.h0", "a1.h3"], ["a0.h1", "a0.h2", "a1.h0", "a1.h1"]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gptj", "gemma2", "opt"])
@pytest.mark.parametrize("grouped", [True, False])
def test_answers_without_heads_equal_runs_with_their_edges_cut(made, name, grouped):
    model, task = made(name)
    prompts = task.test
    ranks, losses = answers_without(model, prompts, SETS, task.context_of(prompts) if grouped else None, progress=False)
    for i, heads in enumerate(SETS):
        kept = model.graph.exists.clone()
        kept[[model.graph.sender_index(head) for head in heads]] = False
        logits = run_circuit(model, kept, prompts, Ablation("zero", model.network))
        assert ranks[i].tolist() == answer_ranks(logits, prompts).tolist()
        wanted = -logits[:, 0].log_softmax(-1).gather(-1, prompts.answers[:, :1])[:, 0]
        assert np.allclose(losses[i], wanted.numpy(), atol=1e-4)


def test_small_batches_give_the_same_answers(made, monkeypatch):
    model, task = made("llama")
    groups = task.context_of(task.test)
    whole = answers_without(model, task.test, SETS, groups, progress=False)
    monkeypatch.setattr("kcwb.interventions.head_sets._ROWS", 1)
    single = answers_without(model, task.test, SETS, groups, progress=False)
    assert (whole[0] == single[0]).all() and np.allclose(whole[1], single[1], atol=1e-5)


def test_the_table_is_that_of_ablated_nodes(made):
    model, task = made("llama")
    new = ["a0.h0", "a1.h3"]
    table = ablate_new(model, task, new, draws=20, progress=False).set_index("arm")
    slow = ablate_nodes(model, None, task, new, ablation="zero", progress=False)
    slow = slow[slow["split"] == "D_test"].groupby("state")["rank"]
    for arm, state in (("intact", "before"), ("new heads", "after")):
        assert table.loc[arm, "hit_1"] == (slow.get_group(state) == 1).mean()
        assert table.loc[arm, "hit_10"] == (slow.get_group(state) <= 10).mean()
    sets = matched_head_sets(model.graph, new, 20)
    each = []
    for heads in sets:
        ranks = ablate_nodes(model, None, task, heads, ablation="zero", progress=False)
        each.append(ranks[(ranks["split"] == "D_test") & (ranks["state"] == "after")]["rank"].to_numpy() == 1)
    assert table.loc["random heads", "hit_1"] == pytest.approx(np.mean(each)) and len(sets) == 9
    harm = sum(hits.mean() <= table.loc["new heads", "hit_1"] for hits in each)
    assert table.loc["new heads", "p_hit_1"] == pytest.approx((1 + harm) / 10)
    ends = {arm: tuple(table.loc[arm, ["low", "high"]]) for arm in ("new heads", "random heads")}
    assert ends["random heads"] == pytest.approx(mean_interval(np.mean(each, axis=0)), nan_ok=True)
    assert ends["new heads"] == proportion_interval(slow.get_group("after") == 1)


def test_without_other_heads_to_draw_the_other_arms_are_still_run(made):
    model, task = made("llama")
    new = ["a0.h0", *(f"a1.h{i}" for i in range(4))]
    with pytest.warns(UserWarning, match="5 of the model's 8 heads"):
        table = ablate_new(model, task, new, ["a0.h1"], draws=3, progress=False)
    assert table["arm"].tolist() == ["intact", "new heads", "shared heads"] and table["p_nll"].isna().all()


# --- circuits and new heads ---


def test_resamples_are_circuits_of_facts_drawn_again(made):
    model, task = made("llama")
    zero = make_shots(model, task.relation, 0, n=4, n_test=6, sets=2)
    edges, steps, seed = 40, 2, 3
    found = context_circuits(
        model, {"0": zero, "2": task}, edges=edges, steps=steps, resamples=5, seed=seed, progress=False
    )
    counts = np.random.default_rng(seed).multinomial(4, [0.25] * 4, 5)
    for name, one in (("0", zero), ("2", task)):
        cuts = make_ablation(model, one, "mean")
        circuit, kept = found[name].circuit, found[name].circuit.kept
        scores = attribution_scores(model, make_loss(model, one.val, "nll"), cuts, steps=steps)
        assert abs(circuit.n_edges - edges) <= 3 and circuit.provenance["shots"]["k"] == int(name)
        asked = int((scores[model.graph.exists] >= scores[kept].min() - 1e-6).sum())
        for i, count in enumerate(counts):
            rows = [row for row, n in enumerate(count) for _ in range(n)]
            again = attribution_scores(model, make_loss(model, one.val.select(rows), "nll"), cuts, steps=steps)
            slow = Circuit(model.graph, select_edges(model.graph, again, edges=asked)).without_dangling()
            nodes = set(np.array(model.graph.sender_names)[found[name].presence[i]])
            assert len(nodes ^ (set(slow.nodes["node"]) - {"logits"})) <= 1  # rounding may swap the last edge


def test_new_shared_and_gone_heads_are_counted_over_resamples():
    graph = Graph(2, 2)
    names = graph.sender_names

    def circuit(*nodes: str) -> Circuit:
        edges = [
            edge for node in nodes for edge in (f"input->{node}{'' if node[0] == 'm' else '<v>'}", f"{node}->logits")
        ]
        return Circuit.from_edges(graph, edges)

    def presence(**shares: int) -> np.ndarray:
        found = np.zeros((10, graph.n_senders), bool)
        for node, count in shares.items():
            found[:count, names.index(node.replace("_", "."))] = True
        return found

    before = ResampledCircuit(circuit("a0.h0", "m0", "a1.h1"), presence(a0_h0=10, m0=9, a1_h1=10, a0_h1=3))
    after = ResampledCircuit(circuit("a0.h0", "a0.h1", "a1.h0", "m1"), presence(a0_h0=9, a0_h1=10, a1_h0=8, m1=10))
    table = new_heads(before, after).set_index("node")
    assert table["status"].to_dict() == {
        "a0.h0": "shared", "a0.h1": "unsure", "m0": "gone", "a1.h0": "new", "a1.h1": "gone", "m1": "new"
    }  # fmt: skip
    assert [table[column]["a0.h1"] for column in ("new", "both", "in_after")] == [0.7, 0.3, 1.0]
    assert new_heads(before, after, least=0.7).set_index("node").loc["a0.h1", "status"] == "new"
    assert table.loc["m1", "kind"] == "mlp" and list(table.index) == [n for n in names if n in table.index]
    with pytest.raises(SettingError, match="least=0"):
        new_heads(before, after, least=0)
    with pytest.raises(SettingError, match="10 and 5 resamples"):
        new_heads(before, replace(after, presence=after.presence[:5]))


# --- what they read ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_attention_to_demonstrations_equals_the_heads_patterns(made, name):
    model, task = made(name)
    heads = demonstration_attention(model, task)
    assert np.allclose(heads[list(GROUPS)].sum(axis=1), 1, atol=1e-5)
    groups = task.groups(model, task.test)
    for node in ("a0.h1", "a1.h3"):
        mass = np.zeros(len(GROUPS))
        for i in range(len(task.test)):
            row = attention_pattern(model, task.test, node, prompt=i).iloc[-1].to_numpy()
            mass += groups[:, i, : len(row)].numpy() @ row / len(task.test)
        assert np.allclose(heads.set_index("node").loc[node, list(GROUPS)].astype(float), mass, atol=1e-5)
    scores = pattern_scores(model)
    assert heads["induction"].tolist() == scores["induction"].flatten().tolist()


def test_reading_is_compared_with_heads_of_the_same_layers(made):
    model, task = made("llama")
    heads = demonstration_attention(model, task).assign(status="in neither")
    heads.loc[heads["node"] == "a1.h2", "status"] = "new"
    heads.loc[heads["node"].isin(["a0.h0", "a1.h0"]), "status"] = ["shared", "unsure"]
    row = reading_summary(model, heads, draws=300).set_index("quantity").T.to_dict()["object"]
    values = heads.set_index("node")["object"].to_dict()
    assert row["new heads"] == values["a1.h2"]
    assert row["other heads"] == pytest.approx((values["a0.h0"] + values["a1.h0"]) / 2)
    rest = [values[name] for name in ("a1.h0", "a1.h1", "a1.h3")]
    assert row["random heads"] == pytest.approx(np.mean(rest), abs=0.03)
    assert (row["p"] <= 0.25) == (values["a1.h2"] > max(rest))


# --- reports, cancelling, and what is refused ---


def test_accuracy_is_the_share_of_first_choices(made):
    _, task = made("llama")
    ranks = task.test.ranks.numpy()
    row = shot_accuracy([task]).iloc[0]
    assert (row["hit_1"], row["hit_10"]) == ((ranks == 1).mean(), (ranks <= 10).mean())
    assert row["low"] - 1e-9 <= row["hit_1"] <= row["high"] + 1e-9 and (row["k"], row["facts"]) == (2, 6)


def test_it_can_be_cancelled_in_every_part(planted):
    model, relation, others = planted
    seen = []

    class Cancelled(Exception):
        pass

    def stop_at(part: str):
        def progress(done: int, total: int, note: str) -> None:
            seen.append(note)
            if note.startswith(part):
                raise Cancelled

        return progress

    for part in ("questions", "circuits", "ablation"):
        with pytest.raises(Cancelled):
            in_context(
                model,
                relation,
                2,
                edges=10,
                n=4,
                n_test=4,
                unrelated=others,
                resamples=5,
                draws=5,
                progress=stop_at(part),
            )
    assert {note.split(",")[0] for note in seen} == {"questions", "circuits", "ablation"}


def test_results_repeat(planted, found):
    again = study(planted)
    for name in ("nodes", "ablation", "heads", "reading"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"edges": 0}, {"edges": 10**6}, {"draws": 0}, {"resamples": 0}, {"steps": 0}], ids=str
)
def test_settings_that_cannot_be_meant_are_refused_before_any_work(planted, monkeypatch, wrong):
    monkeypatch.setattr("kcwb.studies.in_context.heads.shot_tasks", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(SettingError):
        in_context(planted[0], planted[1], **{"k": 2, "progress": False, **wrong})


def test_what_cannot_be_asked_is_refused(made):
    model, task = made("llama")
    empty = make_shots(model, task.relation, 1, n=4, n_test=0, unrelated=[_filler()])
    with pytest.raises(DataError, match="D_test of tiny has no facts"):
        ablate_new(model, empty, ["a0.h0"], progress=False)
    with pytest.raises(DataError, match="D_test of tiny has no facts"):
        demonstration_attention(model, empty)
    with pytest.raises(CircuitError, match="m0 is not an attention head"):
        answers_without(model, task.test, [["m0"]], progress=False)
    single = make_shots(model, task.relation, 1, n=1, n_test=0, unrelated=[_filler()])
    with pytest.raises(DataError, match="ask 1 in D_val"):
        context_circuits(model, {"1": single}, edges=9, progress=False)
    other = make_shots(model, task.relation, 1, n=4, n_test=0, seed=5, unrelated=[_filler()])
    with pytest.raises(DataError, match="ask different facts"):
        context_circuits(model, {"1": empty, "other": other}, edges=9, progress=False)


@pytest.mark.model
def test_the_built_in_model_without_heads_equals_its_cut_runs(smollm2):
    tasks = shot_tasks(smollm2, "country_capital", [(2, "shots")], n=2, n_test=4, sets=2)
    task = tasks[2, "shots"]
    sets = [["a5.h1", "a20.h3"], ["a23.h4"]]
    ranks, losses = answers_without(smollm2, task.test, sets, task.context_of(task.test), progress=False)
    for i, heads in enumerate(sets):
        kept = smollm2.graph.exists.clone()
        kept[[smollm2.graph.sender_index(head) for head in heads]] = False
        logits = run_circuit(smollm2, kept, task.test, Ablation("zero", smollm2.network))
        wanted = -logits[:, 0].log_softmax(-1).gather(-1, task.test.answers[:, :1])[:, 0]
        assert np.allclose(losses[i], wanted.numpy(), atol=2e-3)
        assert (abs(ranks[i] - answer_ranks(logits, task.test).numpy()) <= 0.01 * ranks[i]).all()
