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
    from kcwb.analysis.answers import measure_answers
    from kcwb.analysis.causal import check_roles, faithful_story
    from kcwb.analysis.compare import compare_circuits
    from kcwb.analysis.completeness import completeness
    from kcwb.analysis.dla import dla_by_source
    from kcwb.analysis.encoders import ablate_encoder
    from kcwb.analysis.faithfulness import cmd, comprehensiveness, cpr, faithfulness_curve, minimality
    from kcwb.analysis.hallucination import diagnose
    from kcwb.analysis.hallucination_study import hallucination_study, predict_wrong
    from kcwb.analysis.heads import head_roles, role_agreement
    from kcwb.analysis.hopcircuits import hop_circuits, hop_overlap
    from kcwb.analysis.hopdeletion import delete_first_hop
    from kcwb.analysis.in_context import (
        ablate_new,
        context_circuits,
        demonstration_attention,
        in_context,
        new_heads,
        shot_accuracy,
    )
    from kcwb.analysis.knowledge import knowledge_table
    from kcwb.analysis.lens import arrival, lens
    from kcwb.analysis.multihop import hop_arrival, hop_lens, reversal
    from kcwb.analysis.nodes import ablate_nodes, ablation_summary, attention_pattern, component_logits, node_edges
    from kcwb.analysis.rescue import rescue
    from kcwb.analysis.shared import circuit_overlap, relation_matrix, shared_heads
    from kcwb.analysis.stability import bootstrap_stability, template_stability
    from kcwb.circuits.ablation import make_ablation
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.interchange import load_gv, load_mib, save_mib
    from kcwb.circuits.run import run_circuit
    from kcwb.discovery.baselines import random_circuit
    from kcwb.discovery.discover import discover, predict, score_edges, tau_from_kc, tau_path
    from kcwb.discovery.selection import resize
    from kcwb.editing.account import account, compare_edits
    from kcwb.editing.cases import EditCase, edit_cases, load_counterfact
    from kcwb.editing.compare import compare_edit
    from kcwb.editing.covariance import covariance
    from kcwb.editing.edit import Edit, EditError, edit
    from kcwb.editing.scores import edit_scores, score_summary
    from kcwb.errors import CircuitError, DataError, KcwbError, ModelError, SettingError
    from kcwb.models.encoder import load_encoder
    from kcwb.models.graph import Graph
    from kcwb.models.loading import Model, load_model
    from kcwb.tasks.compose import compose, compositions, reverse
    from kcwb.tasks.hops import ask_hops, funnel, make_hops
    from kcwb.tasks.masked import make_masked_task
    from kcwb.tasks.metrics import answer_ranks, hit_at_k, make_loss
    from kcwb.tasks.mquake import load_mquake
    from kcwb.tasks.prompts import Task, make_task
    from kcwb.tasks.relations import Fact, Relation, load_relation, load_relations
    from kcwb.tasks.shots import make_shots, shot_tasks
    from kcwb.workbench.graphsvg import graph_svg
    from kcwb.workbench.graphview import compare_view, graph_view
    from kcwb.workbench.reports import provenance, report
    from kcwb.world.facts import make_world
    from kcwb.world.models import load_world, train_world, world_knowledge

_HOME = {
    "kcwb.analysis.answers": ("measure_answers",),
    "kcwb.analysis.causal": ("check_roles", "faithful_story"),
    "kcwb.analysis.compare": ("compare_circuits",),
    "kcwb.analysis.completeness": ("completeness",),
    "kcwb.analysis.dla": ("dla_by_source",),
    "kcwb.analysis.encoders": ("ablate_encoder",),
    "kcwb.analysis.faithfulness": ("cmd", "comprehensiveness", "cpr", "faithfulness_curve", "minimality"),
    "kcwb.analysis.hallucination": ("diagnose",),
    "kcwb.analysis.hallucination_study": ("hallucination_study", "predict_wrong"),
    "kcwb.analysis.heads": ("head_roles", "role_agreement"),
    "kcwb.analysis.hopcircuits": ("hop_circuits", "hop_overlap"),
    "kcwb.analysis.hopdeletion": ("delete_first_hop",),
    "kcwb.analysis.in_context": (
        "ablate_new",
        "context_circuits",
        "demonstration_attention",
        "in_context",
        "new_heads",
        "shot_accuracy",
    ),
    "kcwb.analysis.knowledge": ("knowledge_table",),
    "kcwb.analysis.lens": ("arrival", "lens"),
    "kcwb.analysis.multihop": ("hop_arrival", "hop_lens", "reversal"),
    "kcwb.analysis.nodes": ("ablate_nodes", "ablation_summary", "attention_pattern", "component_logits", "node_edges"),
    "kcwb.analysis.rescue": ("rescue",),
    "kcwb.analysis.shared": ("circuit_overlap", "relation_matrix", "shared_heads"),
    "kcwb.analysis.stability": ("bootstrap_stability", "template_stability"),
    "kcwb.circuits.ablation": ("make_ablation",),
    "kcwb.circuits.circuit": ("Circuit",),
    "kcwb.circuits.interchange": ("load_gv", "load_mib", "save_mib"),
    "kcwb.circuits.run": ("run_circuit",),
    "kcwb.discovery.baselines": ("random_circuit",),
    "kcwb.discovery.discover": ("discover", "predict", "score_edges", "tau_from_kc", "tau_path"),
    "kcwb.discovery.selection": ("resize",),
    "kcwb.editing.account": ("account", "compare_edits"),
    "kcwb.editing.cases": ("EditCase", "edit_cases", "load_counterfact"),
    "kcwb.editing.compare": ("compare_edit",),
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
    "kcwb.workbench.graphsvg": ("graph_svg",),
    "kcwb.workbench.graphview": ("compare_view", "graph_view"),
    "kcwb.workbench.reports": ("provenance", "report"),
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
