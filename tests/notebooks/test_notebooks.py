"""Every notebook runs from top to bottom with small parameters, shows what it promises, and is committed clean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from tests.notebooks import few
from tests.notebooks.kernels import forked_kernels

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_there_are_notebooks():
    assert NAMES[:2] == ["00_start_here", "01_discovery"]


@pytest.fixture(params=NOTEBOOKS, ids=NAMES)
def notebook(request) -> Any:
    return nbformat.read(request.param, as_version=4)


def test_notebooks_are_committed_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata


def test_one_cell_holds_the_parameters(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"


def test_prose_is_at_least_two_cells_of_five(notebook):
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 0.4 * len(notebook.cells)


def test_no_cell_is_dead(notebook):
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert any(not line.lstrip().startswith("#") for line in cell.source.splitlines() if line.strip())


def test_sections_are_numbered_in_order(notebook):
    numbers = [
        int(number)
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for number in re.findall(r"^## (\d+)\.", cell.source, flags=re.MULTILINE)
    ]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3


# --- run ---


Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Iterator[Run]:
    """Execute a notebook with parameters; it runs in a folder of its own, as a reader's would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FOLDER.parent))
        with forked_kernels(tmp_path_factory.mktemp("kernels")) as kernels:
            yield lambda name, folder, **parameters: papermill.execute_notebook(
                FOLDER / f"{name}.ipynb", folder / f"{name}.ipynb", parameters, progress_bar=False, cwd=folder,
                kernel_name="python3", kernel_manager_class=kernels, execution_timeout=600,
            )  # fmt: skip


@pytest.fixture(scope="module")
def start(run, tmp_path_factory) -> Any:
    return run("00_start_here", tmp_path_factory.mktemp("start"), facts=2, edges=60)


@pytest.fixture(scope="module")
def discovery(run, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("discovery")
    (relation,) = few(folder, "country_language")
    yield run("01_discovery", folder, relation=relation, edges=80, n=2, draws=1)
    assert sorted(path.name for path in folder.iterdir()) == ["01_discovery.ipynb", relation]  # nothing left behind


def outputs(notebook: Any, source: str) -> Iterator[Any]:
    """What the cells whose source holds a text, however its lines are broken, have shown."""
    wanted = "".join(source.split())
    found = [cell for cell in notebook.cells if cell.cell_type == "code" and wanted in "".join(cell.source.split())]
    assert found
    for cell in found:
        yield from cell.outputs


def shown(notebook: Any, source: str, kind: str = "text/html") -> str:
    return "\n".join(output.data[kind] for output in outputs(notebook, source) if kind in output.get("data", {}))


def no_warnings(notebook: Any) -> None:
    """Nothing on stderr but progress bars, and the notice of facts whose answer's first token does not tell it."""
    notice = re.compile(r".*KcwbWarning: .*so that this token does not tell which is meant.*: left out\.\n.*\n")
    for output in (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs):
        if output.output_type == "stream" and output.name == "stderr":
            said = notice.sub("", output.text)
            assert "Warning" not in said and "Traceback" not in said, said


@pytest.mark.model
def test_start_here_shows_what_the_model_knows(start):
    table = shown(start, "knowledge_table(")
    for words in ("country_capital", "word_sentiment", "hit_10", "answers", "linguistic"):
        assert words in table
    assert shown(start, "plot_knowledge(table)", "image/png")
    no_warnings(start)


@pytest.mark.model
def test_start_here_traces_a_fact(start):
    runs = shown(start, "make_ablation")
    for words in ("full model", "circuit", "empty circuit", "The capital of"):
        assert words in runs
    assert "<iframe" in shown(start, "graph_view(circuit")


@pytest.mark.model
def test_start_here_looks_at_one_node(start):
    panel = shown(start, "NodePanel(model")
    assert panel.count("<iframe") == 1
    for words in ("Attention", "Writes", "Edges", "Without", "in the circuit alone"):
        assert words in panel
    assert "above_mean" in shown(start, "component_logits(model") and "receiver" in shown(start, "node_edges(circuit")
    assert shown(start, "plot_attention(reading.attention", "image/png") and shown(
        start, "plot_bars(without", "image/png"
    )
    assert "after" in shown(start, "without.round(3)")


@pytest.mark.model
def test_discovery_leaves_the_panels_result_in_the_notebook(discovery):
    panel = shown(discovery, "DiscoveryPanel(\n")
    assert panel.count("<iframe") == 1
    for words in ("country_language", "Is it the model?", "random circuits", "Strongest edges"):
        assert words in panel
    assert "application/vnd.jupyter.widget-view+json" in next(outputs(discovery, "DiscoveryPanel(\n")).data


@pytest.mark.model
def test_discovery_finds_the_same_in_plain_code(discovery):
    by_panel = shown(discovery, "panel.wait()", "text/plain")
    by_code = shown(discovery, "circuit = kcwb.discover", "text/plain").splitlines()[-1]
    assert by_panel == by_code and "gim, mean" in by_code
    assert "<iframe" in shown(discovery, "graph_view(circuit, title=task.template)")
    assert "receiver" in shown(discovery, "circuit.edges.head")
    assert "full model" in shown(discovery, "table.round(2)")


@pytest.mark.model
def test_discovery_looks_at_one_node_by_panel_and_by_code(discovery):
    panel = shown(discovery, "panel.nodes.select")
    for words in ("Attention", "Writes", "Edges", "Without"):
        assert words in panel
    assert "above_mean" in shown(discovery, "component_logits(model")
    assert "receiver" in shown(discovery, "node_edges(circuit") and "after" in shown(discovery, "without.round(3)")
    assert "iou" in shown(discovery, "compare_view(found") and "<iframe" in shown(discovery, "compare_view(found")


@pytest.mark.model
def test_discovery_compares_ablations_and_keeps_the_circuit(discovery):
    assert shown(discovery, "plot_completeness(", "image/png")
    both = shown(discovery, "hits.round(2)")
    assert "zero" in both and "empty circuit" in both and "random" not in both
    assert shown(discovery, "again.iou(circuit)", "text/plain") == "1.0"
    assert "smollm2-135m" in shown(discovery, "provenance(model")
    no_warnings(discovery)


@pytest.mark.model
def test_completeness_tabulates_two_relations_and_keeps_its_circuits(run, tmp_path):
    relations = few(tmp_path, "country_capital", "antonym")
    executed = run(
        "02_completeness", tmp_path, relations=relations, curve_relation=relations[0], edges=50, n=4, draws=1
    )
    table = shown(executed, 'table.loc["average"]')
    for words in ("country_capital", "antonym", "average", "random circuits"):
        assert words in table
    assert sorted(path.name for path in (tmp_path / "results").glob("country_capital*.json"))
    no_warnings(executed)


@pytest.mark.model
def test_threshold_sensitivity_finds_a_core_of_two_thresholds(run, tmp_path):
    (relation,) = few(tmp_path, "country_capital")
    executed = run(
        "03_threshold_sensitivity", tmp_path, relation=relation, taus=[0.1, 0.02], within=60, n=1, n_test=3, draws=1
    )
    assert "near ties" in shown(executed, '"near ties"')
    assert "<iframe" in shown(executed, "graph_view(core")
    assert "loss" in shown(executed, "inside = core.nodes")
    no_warnings(executed)


@pytest.mark.model
def test_head_roles_follows_a_fact_and_says_what_holds(run, tmp_path):
    relation, other = few(tmp_path, "country_capital", "antonym")
    executed = run(
        "04_head_roles", tmp_path, relation=relation, relations=[other], edges=120, n=5, draws=1, random_heads=19
    )
    assert "the model ranks it" in next(outputs(executed, "subjects = [fact")).text
    for cell in ("fact=fact.subject", "plot_heads(", "plot_attention(", "sns.clustermap("):
        assert shown(executed, cell, "image/png")
    roles = shown(executed, "roles[shown]")
    assert "a23.h4" in roles and "mover" in roles
    assert "holds" in shown(executed, "check.heads[columns]")
    assert "random heads and MLPs" in shown(executed, "story.round")
    assert "<iframe" in shown(executed, "graph_view(circuit, roles=marked")
    verdicts = shown(executed, "verdicts.style")
    assert "too few to say" in verdicts and "most movers hold one by one" in verdicts
    no_warnings(executed)


@pytest.mark.model
def test_editing_changes_a_fact_and_weighs_the_papers_account(run, tmp_path):
    executed = run(
        "05_editing", tmp_path, edits=1, compared=1, draws=4, size=60, bears=["rome"], at=[1], texts=2,
        methods={
            "rome": {"prefixes": 1, "covariance": "identity", "steps": 10}, "ft_m": {"steps": 5}, "ft_l": {"steps": 5},
        },
    )  # fmt: skip
    assert shown(executed, "edit_claims(")
    assert "perplexity" in shown(executed, "lasting.set_index")
    no_warnings(executed)


@pytest.mark.model
def test_in_context_learning_makes_the_papers_table(run, tmp_path):
    executed = run(
        "07_in_context_learning", tmp_path, relations=["country_capital", "word_sentiment"], k=1, shots=[0, 1],
        edges=120, n=2, n_test=3, sets=1, steps=1, resamples=5, draws=2,
    )  # fmt: skip
    contexts = "".join(output.text for output in outputs(executed, "for kind in kcwb.tasks.KINDS:\n    text"))
    lengths = {kind: int(n) for kind, n in re.findall(r"--- (\w+), (\d+) tokens", contexts)}
    assert lengths["shots"] == lengths["unrelated"] and "The capital of" in contexts
    assert abs(lengths["shots"] - lengths["shuffled"]) <= 3  # one shot cannot be shuffled: it has another object
    panel = shown(executed, "ContextPanel(")
    assert "country_capital" in panel and "intact" in panel and panel.count("<iframe") == 1
    for cell in ("accuracy_plot(", "ablation_plot(found", "plot_attention("):
        assert shown(executed, cell, "image/png")
    assert "89.02" in shown(executed, "published = {") and "too few" in shown(executed, "def judge")
    no_warnings(executed)


@pytest.mark.model
def test_multi_hop_counts_what_is_left_and_compares_circuits(run, tmp_path):
    (first,) = few(tmp_path, "food_country", facts=32)
    executed = run(
        "08_multi_hop", tmp_path, first=first, second="country_capital", pairs=[], n=2, edges=300, controls=[],
        draws=2, resamples=2, steps=2, reversed_relations=["superhero_person"],
    )  # fmt: skip
    assert "not by relation alone" in shown(executed, "funnel(answers.ranks")
    for cell in ("read at: END", "plot_bars(one_fact", "plot_bars(shown"):
        assert shown(executed, cell, "image/png")
    assert "integrated" in shown(executed, "overlap.set_index")
    assert "hop 1 only" in shown(executed, "deletion.set_index")
    assert "Funnel" in shown(executed, "HopPanel(")
    assert "too few to say" in shown(executed, "def judge") and "0.83" in shown(executed, "published = {")
    no_warnings(executed)


@pytest.mark.model
def test_hallucination_tells_a_case_and_tries_it_on_many(run, tmp_path):
    relations = ["country_capital", *few(tmp_path, "country_language", "city_country", facts=40)]
    executed = run(
        "06_hallucination", tmp_path, relations=relations, n=8, movers=4,
        draws=20, pairs=2,
    )  # fmt: skip
    words = next(outputs(executed, "print(case.words)")).text
    assert "The capital of Australia" in words and "mover heads" in words
    assert shown(executed, "plot_diagnosis(case)", "image/png") and shown(executed, "plot_scores(study", "image/png")
    panel = shown(executed, "HallucinationPanel(model")
    assert "Who decides" in panel and "Malaysia" in panel
    scores = shown(executed, 'study.scores.drop(columns="pooled")')
    assert "confidence + random heads" in scores and "diagnostic: margin" in scores
    assert "all heads" in shown(executed, "patched.summary.round")
    assert "they rescue more answers than random heads do" in shown(executed, "style.hide")
    no_warnings(executed)


def test_across_models_trains_finds_roles_and_judges_each_model(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))  # nothing is found there: the models are trained
    executed = run(
        "09_across_models", tmp_path, architectures=["llama", "bert"], models=[], relations=[], steps=120,
        world_relations=["person_city", "city_country", "person_country"], world_edges=100, n=4, tau=0.05, draws=1,
        edits=1,
    )  # fmt: skip
    assert shown(executed, "plot_bars(known", "image/png") and shown(executed, "sns.stripplot(", "image/png")
    for kind in ("atomic", "composed", "held out"):
        assert kind in shown(executed, 'columns="kind"')
    assert "suppressor" in shown(executed, "counts.reindex(pd.MultiIndex") and "ACDC" in shown(executed, "overlaps")
    for outcome in ("country follows", "converged"):
        assert outcome in shown(executed, "effects.reindex")
    assert "bert" in shown(executed, "node_costs(name, relation)") and shown(executed, "sns.heatmap(", "image/png")
    verdicts = shown(executed, "verdicts.style")
    for words in ("held-out facts are known", "movers sit in the second half", "the country follows", "bert"):
        assert words in verdicts
    no_warnings(executed)


@pytest.mark.model
def test_how_sure_draws_many_circuits_and_says_what_they_depend_on(run, tmp_path):
    relation, other = few(tmp_path, "country_capital", "antonym")
    executed = run(
        "11_how_sure", tmp_path, relation=relation, relations=[other], edges=120, n=4, n_test=4, draws=5, levels=1,
        confidences=[0.5, 0.9], within=20, orders=2,
    )  # fmt: skip
    assert "Ensemble(5 draws" in next(outputs(executed, "ensemble.edges.head")).text
    for cell in ("plot_inclusion(", "plot_sources(", "plot_confidence("):
        assert shown(executed, cell, "image/png")
    for source in ("facts", "setting", "everything"):
        assert source in shown(executed, "ensemble.sources.round")
    assert "cross-fitted" in shown(executed, "curve.set_index") and "bound" in shown(executed, "bound(confidences")
    assert "<iframe" in shown(executed, "EnsemblePanel(")
    assert any("named heads" in output.get("text", "") for output in outputs(executed, "roles = kcwb.head_roles"))
    assert "antonym" in shown(executed, "pi >= .9") and "drawn from 1" in shown(executed, "ious = [")
    no_warnings(executed)


@pytest.mark.model
def test_the_referee_judges_circuits_and_puts_claims_beside_them(run, tmp_path):
    relation, other = few(tmp_path, "country_capital", "antonym")
    executed = run(
        "12_referee", tmp_path, relation=relation, relations=[other], methods=["eap-ig", "gim"], edges=60, n=4,
        facts=5, draws=2,
    )  # fmt: skip
    assert "equivalence" in shown(executed, "judgement.questions[")
    assert "of 5 facts" in next(outputs(executed, 'judgement.questions["sentence"]')).text
    for cell in ("plot_matrix(", "plot_minimality("):
        assert shown(executed, cell, "image/png")
    assert "not_shown" in shown(executed, "ranking[[") and "uniqueness" in shown(executed, "value_counts")
    no_warnings(executed)


@pytest.mark.model
def test_the_frontier_compares_methods_of_every_kind(run, tmp_path):
    methods = {"eap": {}, "gim, tuned": {"method": "gim", "select": "tuned"}}
    executed = run(
        "13_frontier", tmp_path, relations=few(tmp_path, "antonym"), others=["ioi"], methods=methods, sizes=[100, 400],
        n=2, n_test=4, learned=60, updates=2, searched=30,
    )  # fmt: skip
    assert shown(executed, "plot_frontier(curves", "image/png")
    table = "".join(shown(executed, "ninety.pivot"))
    assert all(word in table for word in ("gim, tuned", "antonym", "ioi"))
    assert "distance" in "".join(shown(executed, "of_method"))
    assert "edge-pruning, 60 edges" in "".join(shown(executed, "points.assign"))
    no_warnings(executed)


@pytest.mark.model
def test_open_questions_end_in_verdicts(run, tmp_path):
    relation, other = few(tmp_path, "country_capital", "antonym")
    executed = run(
        "14_open_questions", tmp_path, relation=relation, other=other, relations=[relation, other], scaled=[other],
        edges=120, n=6, n_test=4, heads=2, draws=2, edits=2, against=["swept"], wordings=1, seeds=2, marks=[0, 40, 80],
        rome_settings={"prefixes": 1, "covariance": "identity", "steps": 5},
    )  # fmt: skip
    for cell in ("plot_attending(", "sns.heatmap(", "sns.lineplot("):
        assert shown(executed, cell, "image/png")
    assert "interaction" in shown(executed, "together.head") and "righted" in shown(executed, "pd.concat(parts")
    assert "swept" in shown(executed, "means.round") and "mover" in shown(executed, "proposed.drop")
    verdicts = shown(executed, "pd.DataFrame(verdicts)")
    for words in ("make the movers' queries", "recover other relations", "better edits", "before the facts are known"):
        assert words.replace("'", "&#x27;") in verdicts or words in verdicts
    no_warnings(executed)


@pytest.mark.model
def test_discovery_is_played_by_hand_and_in_code(discovery):
    assert "<iframe" in shown(discovery, "CircuitGraph(circuit")
    cuts = shown(discovery, "one_by_one")
    assert "together" in cuts and "the weaker" in cuts
    assert "cost here" in shown(discovery, "cost here") and "gain" in shown(discovery, "play.force(name)")


@pytest.mark.model
def test_sweeps_fills_a_store_and_counts_operations(run, tmp_path):
    executed = run(
        "10_sweeps", tmp_path, relations=["antonym"], methods=["eap"], edges=150, n=2, ablations=["mean"],
        scale_layers=[2], scale_widths=[64], timed=[[2, 4, 64]],
    )  # fmt: skip
    assert "antonym" in "".join(shown(executed, "sweep("))
    assert "70" in shown(executed, '"EAP-IG"')
    assert "2 x 4, 64" in shown(executed, "time_shape(layers") and "memory (GB)" in shown(executed, "time_shape(layers")
    assert "smollm2-135m" in shown(executed, "provenance(")
    no_warnings(executed)
