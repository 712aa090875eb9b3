"""Tables of prompts: how they are read, what is refused, and that everything works on a task made of one."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import kcwb
from kcwb import cli
from kcwb.discovery.methods import METHODS
from kcwb.editing.cases import edit_cases
from kcwb.errors import DataError, SettingError
from kcwb.evaluation.referee import hypotheses
from kcwb.tasks.pairs import make_task_from_pairs, read_pairs
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, load_relation
from kcwb.tasks.shots import make_shots
from kcwb.workbench.panels.discovery import DiscoveryPanel
from tests.tasks import known_relation, spaced_tokenizer
from tests.tiny import WORDS, tiny_encoder, tiny_hf, tokenizer

ROWS: list[dict[str, Any]] = [
    {"clean": "w1 w2 w3", "corrupted": "w1 w9 w3", "answer": "w40|w41", "wrong": "w42", "subject": "w2"},
    {"clean": "w4 w5 w4", "corrupted": "", "answer": "w43", "wrong": "", "subject": "6:8"},
    {"clean": "w6 w7", "corrupted": "w6 w8", "answer": "w44", "wrong": "w45|w46", "subject": ""},
]
FACTS = (
    Fact("w1 w2 w3", "w40", ("w41",), ("w42",), "w1 w9 w3", (3, 5)),
    Fact("w4 w5 w4", "w43", span=(6, 8)),
    Fact("w6 w7", "w44", (), ("w45", "w46"), "w6 w8", (0, 0)),
)


@pytest.fixture
def model(tiny):
    return tiny("llama")


# --- reading ---


def test_a_csv_a_tsv_a_jsonl_and_a_dataframe_say_the_same(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "own.csv", index=False)
    frame.to_csv(tmp_path / "own.tsv", index=False, sep="\t")
    lists = [
        {"clean": "w1 w2 w3", "corrupted": "w1 w9 w3", "answer": ["w40", "w41"], "wrong": ["w42"], "subject": [3, 5]},
        {"clean": "w4 w5 w4", "corrupted": None, "answer": "w43", "wrong": [], "subject": [6, 8]},
        {"clean": "w6 w7", "corrupted": "w6 w8", "answer": ["w44"], "wrong": ["w45", "w46"], "subject": None},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lists)) + "\n", encoding="utf-8")
    read = [read_pairs(tmp_path / f"own.{ending}") for ending in ("csv", "tsv", "jsonl")]
    read += [read_pairs(table, name="own") for table in (frame, pd.DataFrame(lists))]
    assert all(one == read[0] for one in read) and read[0].facts == FACTS
    assert read[0].name == "own" and read[0].prompt_templates_zs == ("{}",)
    assert load_relation(tmp_path / "own.csv") == load_relation(str(tmp_path / "own.jsonl")) == read[0]


def test_a_parquet_file_is_read_or_the_missing_reader_named(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"clean": ["w1 w2"], "answer": [["w3", "w4"]]}).to_parquet(tmp_path / "own.parquet")
    assert read_pairs(tmp_path / "own.parquet").facts == (Fact("w1 w2", "w3", ("w4",), span=(0, 0)),)

    def missing(path: Path) -> None:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(DataError, match=r"own\.parquet.*pip install pyarrow"):
        read_pairs(tmp_path / "own.parquet")


def test_words_like_none_and_na_are_text_in_a_csv(tmp_path):
    (tmp_path / "own.csv").write_text("clean,answer\nNA,None\n", encoding="utf-8")
    assert read_pairs(tmp_path / "own.csv").facts[0].subject == "NA"
    assert read_pairs(tmp_path / "own.csv").facts[0].object == "None"


def test_columns_may_have_other_names_and_others_are_not_read():
    table = pd.DataFrame({"sentence": ["w1 w2"], "answers": ["w3"], "wrong_answers": ["w4"], "length": [2]})
    found = read_pairs(table, columns={"clean": "sentence"}).facts
    assert found == (Fact("w1 w2", "w3", wrong=("w4",), span=(0, 0)),)


def test_a_space_is_put_before_the_answer_unless_the_prompt_or_the_table_says_otherwise():
    def spaces(*cells: Any, **more: Any) -> list[bool]:
        table = pd.DataFrame({"clean": ["12 to 17", "A: "], "answer": ["45", "6"]})
        return [fact.space for fact in read_pairs(table.assign(space=list(cells)) if cells else table, **more).facts]

    assert spaces() == [True, False]
    assert spaces("false", None) == [False, False] and spaces(np.False_, "") == [False, False]
    assert spaces(space=False) == [False, False]


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("w1 w13", "w1", (0, 2)),
        ("at 12:30 to", "12:30", (3, 8)),
        ("nothing", "1:3", (1, 3)),
        ("3 Nigeria", "Niger", (2, 7)),
    ],
)
def test_a_subject_is_found_as_whole_words_then_as_letters_then_by_characters(prompt, subject, span):
    found = read_pairs(pd.DataFrame({"clean": [prompt], "answer": ["w"], "subject": [subject]}))
    assert found.facts[0].span == span


def one_row(**cells: Any) -> pd.DataFrame:
    """A good row, and after it the same with other cells."""
    good = {"clean": "w1 w2 w1", "corrupted": "w1 w3 w1", "answer": "w4", "wrong": "w5", "subject": "w2"}
    return pd.DataFrame([{**good, "clean": "w9"} | {"subject": None}, {**good, **cells}], dtype=object)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"clean": ""}, "row 2: the cell 'clean' is empty"),
        ({"clean": "  "}, "row 2, clean: expected a text that is not empty"),
        ({"clean": 7}, "row 2, clean: expected a text that is not empty, found 7"),
        ({"clean": "w9"}, r"row 2, subject: 'w2' stands 0 times in 'w9'"),
        ({"clean": "w9", "subject": None}, "row 2: the prompt 'w9' stands in row 1 already"),
        ({"clean": "w2 ", "space": True}, "row 2, clean: 'w2 ' ends in white space"),
        ({"answer": None}, "row 2: the cell 'answer' is empty"),
        ({"answer": 46}, "row 2, answer: expected a text or a list of texts, found 46"),
        ({"answer": ["w4", 6]}, r"row 2, answer\[1\]: expected a text that is not empty, found 6"),
        ({"answer": "w4|"}, r"row 2, answer\[1\]: expected a text that is not empty"),
        ({"wrong": "w6|w4"}, "row 2: 'w4' is both a right answer and a wrong one"),
        ({"corrupted": "w1 w2 w1"}, "row 2: the corrupted prompt is the clean one"),
        ({"subject": "w1"}, "row 2, subject: 'w1' stands 2 times"),
        ({"subject": [3, 90]}, r"row 2, subject: \[3, 90\] is neither"),
        ({"subject": [3, 3]}, r"row 2, subject: \[3, 3\] is neither"),
        ({"subject": 3}, "row 2, subject: 3 is neither"),
        ({"space": "perhaps"}, "row 2, space: expected true or false, found 'perhaps'"),
    ],
)
def test_a_bad_cell_is_one_line_with_its_row(cells, words):
    with pytest.raises(DataError, match=words) as caught:
        read_pairs(one_row(**cells))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        (pd.DataFrame({"clean": ["w1"]}), None, "has no column 'answer'; it has clean"),
        (pd.DataFrame({"clean": ["w1"], "prompt": ["w1"], "answer": ["w2"]}), None, "two columns for 'clean'"),
        (pd.DataFrame({"clean": ["w1"], "answer": ["w2"]}), {"clean": "clear"}, "no column 'clear'.*'clean'"),
        (pd.DataFrame({"clean": ["w1"], "answer": ["w2"]}), {"cleen": "clean"}, "'cleen' is no column.*'clean'"),
        (pd.DataFrame({"clean": [], "answer": []}), None, "has no rows"),
        (
            pd.DataFrame([["w1", "w2", "w3"], ["w4", "w5", "w6"]], columns=["text", "text", "answer"]),
            {"clean": "text"},
            "2 columns 'text', for 'clean'",
        ),
    ],
)
def test_a_bad_table_is_refused(table, columns, words):
    with pytest.raises(DataError, match=words):
        read_pairs(table, columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("own.jsonl", b'{"clean": "w1", "answer": "w2"}\n\n{"clean"', "line 3: not JSON"),
        ("own.jsonl", b"[1]", "line 1: expected an object"),
        ("own.csv", b"clean,answer\nw1,w2,w3,w4\nw\xff,2", "not UTF-8|cannot be read"),
        ("own.csv", b"", "cannot be read as a table"),
        ("own.csv", b"clean,answer\nw1, w2,w3\nw4, w5,w6", "Expected 2 fields in line 2, saw 3"),
        ("own.tsv", b"clean\tanswer\nw1\tw2\t\n", "Expected 2 fields in line 2, saw 3"),
        ("own.csv", b"clean,answer,clean\nw1,w2,w3", "two columns for 'clean': 'clean' and 'clean'"),
        ("own.parquet", b"w1", "cannot be read as a table"),
        ("own.txt", b"w1", r"ends in \.csv"),
        ("other/own.csv", None, "no file"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)


# --- a task ---


def test_answers_after_a_space_and_without_one_are_told_apart_each_from_its_own_kind():
    """Of four answers two begin with the same word; two prompts end in a line break, after which no space stands."""
    model = kcwb.load_model(tiny_hf("llama"), spaced_tokenizer(), device="cpu")
    table = pd.DataFrame({"clean": ["w1 w2", "w3\n", "w4 w5", "w6\n"], "answer": ["w10 w11", "w10 w12", "w20", "w21"]})
    facts = read_pairs(table).facts
    prompts = encode(model, facts, "{}", [fact.object for fact in facts])
    assert [fact.space for fact in facts] == [True, False, True, False]
    assert prompts.decides.tolist() == [1, 1, 0, 0]
    texts = [model.tokenizer.decode([token]) for token in prompts.foils.tolist()]
    assert [text.startswith(" ") for text in texts] == [True, False, True, False]
    named = encode(model, facts[2:], "{}", [fact.object for fact in facts], foil="w30").foils.tolist()
    assert [model.tokenizer.decode([token]) for token in named] == [" w30", "w30"]


def test_an_answer_that_runs_into_the_prompt_is_told_with_its_row(model):
    table = pd.DataFrame({"clean": ["w1 w2", "w3 w4"], "answer": ["w5", "w6"]})
    with pytest.raises(DataError, match=r"own, row 1: The answer 'w5' runs into the last token of 'w1 w2'"):
        make_task_from_pairs(model, table, name="own", space=False)


def test_right_answers_that_begin_otherwise_are_told_with_their_row(model):
    table = pd.DataFrame({"clean": ["w1 w2", "w3 w4"], "answer": ["w5", "w6 w7|w8 w9"]})
    with pytest.raises(DataError, match=r"own, row 2: .*do not have all tokens but the last one in common"):
        make_task_from_pairs(model, table, name="own")


def what_it_says(model, n: int = 24, subjects: bool = True) -> pd.DataFrame:
    """Prompts of 3 to 5 words; right is what the model likes best or third (two answers in every fourth), wrong what
    it likes least, and every third answer has a second token. Corrupted in its second word, the subject."""
    draw, rows = np.random.default_rng(0), []
    special = {i for i, word in enumerate(WORDS) if word.startswith("<")}
    for i in range(n):
        words = [WORDS[j] for j in draw.permutation(range(4, 44))[: 3 + i % 3]]
        order = [
            j for j in model.logits(ids(words, model))[0, -1].argsort(descending=True).tolist() if j not in special
        ]
        right = [WORDS[order[0]]] if i % 4 else [WORDS[order[2]], WORDS[order[1]]]
        if i % 3 == 0 and i % 4:
            right = [f"{right[0]} w{80 + i % 5}"]
        wrong = [WORDS[j] for j in order[-1 - i % 2 :]]
        row = {"clean": " ".join(words), "answer": "|".join(right), "wrong": "|".join(wrong)}
        row["corrupted"] = " ".join([words[0], "w77", *words[2:]])
        rows.append(row | ({"subject": words[1]} if subjects else {}))
    return pd.DataFrame(rows)


def ids(words: list[str], model) -> torch.Tensor:
    return torch.tensor([[*([1] if model.prepend_bos else []), *map(WORDS.index, words)]])


@pytest.fixture
def table(model) -> pd.DataFrame:
    return what_it_says(model)


@pytest.fixture
def task(model, table):
    return make_task_from_pairs(model, table, name="own", n=8, seed=1)


def test_a_task_of_a_table_is_that_of_its_relation_saved_and_loaded(model, table, task, tmp_path):
    task.relation.save(tmp_path / "own.json")
    table.to_csv(tmp_path / "own.csv", index=False)
    assert task.n_known == task.n_facts == 24 and bool(task.val.paired.all())
    assert (task.val.lengths.min(), task.val.lengths.max()) == (3, 5)
    for path in ("own.json", "own.csv"):
        again = kcwb.make_task(model, str(tmp_path / path), n=8, seed=1)
        assert again.relation.digest == task.relation.digest
        assert again.val.tokens.equal(task.val.tokens) and again.val.corrupted.equal(task.val.corrupted)


def test_a_relation_written_as_whole_prompts_is_the_same_task(model):
    relation = known_relation(model, 16)
    template, before = relation.prompt_templates_zs[0], relation.prompt_templates_zs[0].index("{}")
    rows = [
        {
            "clean": template.replace("{}", fact.subject),
            "answer": fact.object,
            "subject": [before, before + len(fact.subject)],
        }
        for fact in relation.facts
    ]
    own, plain = make_task_from_pairs(model, pd.DataFrame(rows), seed=3), kcwb.make_task(model, relation, seed=3)
    for part in ("val", "test", "reference"):
        ours, theirs = getattr(own, part), getattr(plain, part)
        assert ours.texts == theirs.texts
        for field in fields(ours):
            if field.name not in ("facts", "texts"):
                assert getattr(ours, field.name).equal(getattr(theirs, field.name)), field.name
    assert not ours.further


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_finds_a_circuit(model, task, method):
    given = {"edges": 60, "updates": 20, "rounds": 3}
    takes = {*METHODS[method].own, *(["edges"] if METHODS[method].scores else [])}
    size = {key: value for key, value in given.items() if key in takes}
    circuit = kcwb.discover(model, task, method=method, ablation="resample", progress=False, **size)
    assert 0 < circuit.n_edges <= int(model.graph.exists.sum())
    assert circuit.provenance["relation"]["digest"] == task.relation.digest


@pytest.mark.parametrize("metric", ["nll", "kl", "logit_diff"])
def test_acdc_within_a_circuit_and_its_completeness_and_faithfulness(model, task, metric):
    first = kcwb.discover(model, task, metric=metric, ablation="resample", edges=60, progress=False)
    circuit = kcwb.discover(model, task, method="acdc", within=first, tau=1e-3, metric=metric, progress=False)
    assert 0 < circuit.n_edges <= first.n_edges and not bool((circuit.kept & ~first.kept).any())
    assert kcwb.completeness(model, circuit, task, progress=False).notna().any(axis=None)
    curve = kcwb.faithfulness_curve(model, task, first, metric=metric, ablation="resample", progress=False)
    assert len(curve) > 2


def test_head_roles_and_the_lens_read_the_subject(model, task):
    roles = kcwb.head_roles(model, None, task, shuffles=20, resamples=5, progress=False)
    assert len(roles) == model.graph.n_layers * model.graph.n_heads and roles["D_S"].abs().sum() > 0
    bos = int(model.prepend_bos)
    assert task.val.subject_start.tolist() == [1 + bos] * len(task.val)
    assert len(kcwb.lens(model, task, progress=False))


def test_without_spans_what_needs_a_subject_says_so(model):
    task = make_task_from_pairs(model, what_it_says(model, subjects=False))
    for ask in (lambda: kcwb.head_roles(model, None, task), lambda: kcwb.lens(model, task)):
        with pytest.raises(DataError, match=r"is the subject is not known.*column 'subject'"):
            ask()


def test_an_ensemble_is_drawn_and_its_twin_with_shuffled_answers(model, task):
    for more in ({}, {"shuffled": True}):
        found = kcwb.discover_many(
            model, task, draws=4, vary=("facts", "ablation"), edges=40, ablation="resample", progress=False,
            checkpoint=False, **more,
        )  # fmt: skip
        assert len(found.kept) == 4


def test_the_referee_judges_it(model, table, monkeypatch, tmp_path):
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    monkeypatch.setattr(hypotheses, "_PERMUTATIONS", 999)
    monkeypatch.setattr(hypotheses, "_SIMULATIONS", 50)
    task = make_task_from_pairs(model, table, n=6)
    circuit = kcwb.discover(model, task, edges=60, metric="logit_diff", ablation="resample", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judgement = kcwb.referee(model, circuit, task, quick=True, draws=10, relations=0, progress=False)
    assert len(judgement.answers)


def test_the_command_line_takes_a_table_and_a_saved_relation(model, table, tmp_path, capsys):
    tiny_hf("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    table.to_csv(tmp_path / "own.csv", index=False)
    read_pairs(table, name="own").save(tmp_path / "own.json")
    edges = []
    for name in ("own.csv", "own.json"):
        words = ["discover", tmp_path / name, "--model", tmp_path / "model", "--edges", 30, "--quiet", "--json"]
        assert cli.main([str(word) for word in words]) == 0
        edges.append(json.loads(capsys.readouterr().out)["edges"])
    assert edges[0] == edges[1] and edges[0]


def test_the_discovery_panel_picks_it_by_path(model, table, tmp_path):
    read_pairs(table, name="own").save(tmp_path / "own.json")
    panel = DiscoveryPanel(model, tmp_path / "own.json", edges=60, n=4)
    panel.run()
    panel.wait(60)
    assert panel.settings["relation"] == "own" and panel.circuit is not None and panel.circuit.n_edges
    panel.close()


def test_what_needs_subjects_and_templates_refuses_whole_prompts(model, task):
    relation, fact = task.relation, task.relation.facts[0]
    refused = [
        lambda: make_shots(model, relation, 1),
        lambda: kcwb.compose(relation, relation),
        lambda: kcwb.reverse(relation, templates=["w1 {}"]),
        lambda: kcwb.make_masked_task(tiny_encoder("bert"), relation),
        lambda: kcwb.diagnose(model, relation, fact.subject),
        lambda: edit_cases(model, [relation]),
    ]
    for ask in refused:
        with pytest.raises(DataError, match="own is made of whole prompts"):
            ask()
    with pytest.raises(SettingError, match="is a whole prompt, and an edit is about a subject"):
        kcwb.edit(model, fact, "w9", template="{}")
