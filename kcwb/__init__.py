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
    from kcwb.analysis.causal import check_roles, faithful_story
    from kcwb.analysis.compare import compare_circuits
    from kcwb.analysis.completeness import completeness
    from kcwb.analysis.dla import dla_by_source
    from kcwb.analysis.encoders import ablate_encoder
    from kcwb.analysis.faithfulness import cmd, comprehensiveness, cpr, faithfulness_curve, minimality
    from kcwb.analysis.heads import head_roles, role_agreement
    from kcwb.analysis.knowledge import knowledge_table
    from kcwb.analysis.lens import arrival, lens
    from kcwb.analysis.nodes import ablate_nodes, ablation_summary, attention_pattern, component_logits, node_edges
    from kcwb.analysis.shared import circuit_overlap, relation_matrix, shared_heads
    from kcwb.analysis.stability import bootstrap_stability, template_stability
    from kcwb.circuits.ablation import make_ablation
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.interchange import load_gv, load_mib, save_mib
    from kcwb.circuits.run import run_circuit
    from kcwb.discovery.baselines import random_circuit
    from kcwb.discovery.discover import discover, predict, score_edges, tau_path
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
    from kcwb.tasks.masked import make_masked_task
    from kcwb.tasks.metrics import answer_ranks, hit_at_k, make_loss
    from kcwb.tasks.prompts import Task, make_task
    from kcwb.tasks.relations import Fact, Relation, load_relation, load_relations
    from kcwb.workbench.graphsvg import graph_svg
    from kcwb.workbench.graphview import compare_view, graph_view
    from kcwb.workbench.reports import provenance, report

_HOME = {
    "kcwb.analysis.causal": ("check_roles", "faithful_story"),
    "kcwb.analysis.compare": ("compare_circuits",),
    "kcwb.analysis.completeness": ("completeness",),
    "kcwb.analysis.dla": ("dla_by_source",),
    "kcwb.analysis.encoders": ("ablate_encoder",),
    "kcwb.analysis.faithfulness": ("cmd", "comprehensiveness", "cpr", "faithfulness_curve", "minimality"),
    "kcwb.analysis.heads": ("head_roles", "role_agreement"),
    "kcwb.analysis.knowledge": ("knowledge_table",),
    "kcwb.analysis.lens": ("arrival", "lens"),
    "kcwb.analysis.nodes": (
        "ablate_nodes",
        "ablation_summary",
        "attention_pattern",
        "component_logits",
        "node_edges",
    ),
    "kcwb.analysis.shared": ("circuit_overlap", "relation_matrix", "shared_heads"),
    "kcwb.analysis.stability": ("bootstrap_stability", "template_stability"),
    "kcwb.circuits.ablation": ("make_ablation",),
    "kcwb.circuits.circuit": ("Circuit",),
    "kcwb.circuits.interchange": ("load_gv", "load_mib", "save_mib"),
    "kcwb.circuits.run": ("run_circuit",),
    "kcwb.discovery.baselines": ("random_circuit",),
    "kcwb.discovery.discover": ("discover", "predict", "score_edges", "tau_path"),
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
    "kcwb.tasks.masked": ("make_masked_task",),
    "kcwb.tasks.metrics": ("answer_ranks", "hit_at_k", "make_loss"),
    "kcwb.tasks.prompts": ("Task", "make_task"),
    "kcwb.tasks.relations": ("Fact", "Relation", "load_relation", "load_relations"),
    "kcwb.workbench.graphsvg": ("graph_svg",),
    "kcwb.workbench.graphview": ("compare_view", "graph_view"),
    "kcwb.workbench.reports": ("provenance", "report"),
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
