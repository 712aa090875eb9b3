"""kcwb, the Knowledge Circuits Workbench.

Where does a model keep a fact, and what happens when it is wrong or edited?

Five nouns and verbs on them:

    name --load_model--> Model, relation --make_task--> Task --discover--> Circuit --completeness--> DataFrame

Imports are lazy: a name is loaded when it is first used.
"""

# ruff: noqa: F401
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors
    from kcwb.circuits.ablation import make_ablation
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.interchange import load_gv, load_mib, save_mib
    from kcwb.circuits.run import run_circuit
    from kcwb.discovery.baselines import random_circuit
    from kcwb.discovery.discover import discover, predict, score_edges, tau_from_kc, tau_path
    from kcwb.discovery.selection import resize
    from kcwb.editing.cases import EditCase, edit_cases, load_counterfact
    from kcwb.editing.covariance import covariance
    from kcwb.editing.edit import Edit, EditError, edit
    from kcwb.editing.scores import edit_scores, score_summary
    from kcwb.errors import CircuitError, DataError, KcwbError, ModelError, SettingError
    from kcwb.evaluation.compare import compare_circuits
    from kcwb.evaluation.completeness import completeness
    from kcwb.evaluation.faithfulness import cmd, comprehensiveness, cpr, faithfulness_curve, minimality
    from kcwb.evaluation.knowledge import knowledge_table
    from kcwb.evaluation.overlap import circuit_overlap, relation_matrix, shared_heads
    from kcwb.evaluation.stability import bootstrap_stability, template_stability
    from kcwb.interventions.encoder import ablate_encoder
    from kcwb.interventions.role_tests import check_roles, faithful_story
    from kcwb.models.encoder import load_encoder
    from kcwb.models.graph import Graph
    from kcwb.models.loading import Model, load_model
    from kcwb.reading.dla import dla_by_source
    from kcwb.reading.lens import arrival, lens
    from kcwb.reading.nodes import ablate_nodes, ablation_summary, attention_pattern, component_logits, node_edges
    from kcwb.reading.roles import head_roles, role_agreement
    from kcwb.studies.editing_account.claims import account, compare_edits
    from kcwb.studies.editing_account.comparison import compare_edit
    from kcwb.studies.hallucination.diagnosis import diagnose
    from kcwb.studies.hallucination.measurement import measure_answers
    from kcwb.studies.hallucination.prediction import hallucination_study, predict_wrong
    from kcwb.studies.hallucination.rescue import rescue
    from kcwb.studies.in_context.heads import (
        ablate_new,
        context_circuits,
        demonstration_attention,
        in_context,
        new_heads,
        shot_accuracy,
    )
    from kcwb.studies.two_hop.circuits import hop_circuits, hop_overlap
    from kcwb.studies.two_hop.deletion import delete_first_hop
    from kcwb.studies.two_hop.lens import hop_arrival, hop_lens, reversal
    from kcwb.tasks.compose import compose, compositions, reverse
    from kcwb.tasks.hops import ask_hops, funnel, make_hops
    from kcwb.tasks.masked import make_masked_task
    from kcwb.tasks.metrics import answer_ranks, hit_at_k, make_loss
    from kcwb.tasks.mquake import load_mquake
    from kcwb.tasks.prompts import Task, make_task
    from kcwb.tasks.relations import Fact, Relation, load_relation, load_relations
    from kcwb.tasks.shots import make_shots, shot_tasks
    from kcwb.workbench.graph.page import compare_view, graph_view
    from kcwb.workbench.graph.svg import graph_svg
    from kcwb.workbench.report.write import provenance, report
    from kcwb.world.facts import make_world
    from kcwb.world.models import load_world, train_world, world_knowledge

_HOME = {
    "kcwb.studies.hallucination.measurement": ("measure_answers",),
    "kcwb.interventions.role_tests": ("check_roles", "faithful_story"),
    "kcwb.evaluation.compare": ("compare_circuits",),
    "kcwb.evaluation.completeness": ("completeness",),
    "kcwb.reading.dla": ("dla_by_source",),
    "kcwb.interventions.encoder": ("ablate_encoder",),
    "kcwb.evaluation.faithfulness": ("cmd", "comprehensiveness", "cpr", "faithfulness_curve", "minimality"),
    "kcwb.studies.hallucination.diagnosis": ("diagnose",),
    "kcwb.studies.hallucination.prediction": ("hallucination_study", "predict_wrong"),
    "kcwb.reading.roles": ("head_roles", "role_agreement"),
    "kcwb.studies.two_hop.circuits": ("hop_circuits", "hop_overlap"),
    "kcwb.studies.two_hop.deletion": ("delete_first_hop",),
    "kcwb.studies.in_context.heads": (
        "ablate_new",
        "context_circuits",
        "demonstration_attention",
        "in_context",
        "new_heads",
        "shot_accuracy",
    ),
    "kcwb.evaluation.knowledge": ("knowledge_table",),
    "kcwb.reading.lens": ("arrival", "lens"),
    "kcwb.studies.two_hop.lens": ("hop_arrival", "hop_lens", "reversal"),
    "kcwb.reading.nodes": ("ablate_nodes", "ablation_summary", "attention_pattern", "component_logits", "node_edges"),
    "kcwb.studies.hallucination.rescue": ("rescue",),
    "kcwb.evaluation.overlap": ("circuit_overlap", "relation_matrix", "shared_heads"),
    "kcwb.evaluation.stability": ("bootstrap_stability", "template_stability"),
    "kcwb.circuits.ablation": ("make_ablation",),
    "kcwb.circuits.circuit": ("Circuit",),
    "kcwb.circuits.interchange": ("load_gv", "load_mib", "save_mib"),
    "kcwb.circuits.run": ("run_circuit",),
    "kcwb.discovery.baselines": ("random_circuit",),
    "kcwb.discovery.discover": ("discover", "predict", "score_edges", "tau_from_kc", "tau_path"),
    "kcwb.discovery.selection": ("resize",),
    "kcwb.studies.editing_account.claims": ("account", "compare_edits"),
    "kcwb.editing.cases": ("EditCase", "edit_cases", "load_counterfact"),
    "kcwb.studies.editing_account.comparison": ("compare_edit",),
    "kcwb.editing.covariance": ("covariance",),
    "kcwb.editing.edit": ("Edit", "EditError", "edit"),
    "kcwb.editing.scores": ("edit_scores", "score_summary"),
    "kcwb.errors": ("CircuitError", "DataError", "KcwbError", "ModelError", "SettingError"),
    "kcwb.models.encoder": ("load_encoder",),
    "kcwb.models.graph": ("Graph",),
    "kcwb.models.loading": ("Model", "load_model"),
    "kcwb.tasks.compose": ("compose", "compositions", "reverse"),
    "kcwb.tasks.hops": ("ask_hops", "funnel", "make_hops"),
    "kcwb.tasks.masked": ("make_masked_task",),
    "kcwb.tasks.metrics": ("answer_ranks", "hit_at_k", "make_loss"),
    "kcwb.tasks.mquake": ("load_mquake",),
    "kcwb.tasks.prompts": ("Task", "make_task"),
    "kcwb.tasks.relations": ("Fact", "Relation", "load_relation", "load_relations"),
    "kcwb.tasks.shots": ("make_shots", "shot_tasks"),
    "kcwb.workbench.graph.svg": ("graph_svg",),
    "kcwb.workbench.graph.page": ("compare_view", "graph_view"),
    "kcwb.workbench.report.write": ("provenance", "report"),
    "kcwb.world.facts": ("make_world",),
    "kcwb.world.models": ("load_world", "train_world", "world_knowledge"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kcwb")
    if name not in _MODULE_OF:
        raise AttributeError(f"kcwb has no {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
