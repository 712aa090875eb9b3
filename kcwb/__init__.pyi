from . import (
    circuits as circuits,
    discovery as discovery,
    editing as editing,
    evaluation as evaluation,
    files as files,
    interventions as interventions,
    models as models,
    reading as reading,
    statistics as statistics,
    studies as studies,
    sweep as sweep,
    tasks as tasks,
    world as world,
)
from .workbench import graph as graph, panels as panels, plots as plots

# Nouns
from .models.loading import Model as Model
from .models.graph import Graph as Graph
from .tasks.relations import Fact as Fact, Relation as Relation
from .tasks.task import Task as Task
from .circuits.circuit import Circuit as Circuit
from .circuits.ensemble import Ensemble as Ensemble
from .editing.edit import Edit as Edit
from .editing.cases import EditCase as EditCase

# A name becomes a model, a relation a task
from .models.loading import load_model as load_model
from .models.encoder import load_encoder as load_encoder
from .tasks.relations import load_relation as load_relation, load_relations as load_relations
from .tasks.task import make_task as make_task
from .tasks.pairs import make_task_from_pairs as make_task_from_pairs
from .tasks.masked import make_masked_task as make_masked_task
from .tasks.metrics import make_loss as make_loss
from .circuits.ablation import make_ablation as make_ablation

# Which edges matter
from .discovery.discover import (
    discover as discover,
    predict as predict,
    score_edges as score_edges,
    tau_path as tau_path,
)
from .discovery.many import discover_many as discover_many
from .discovery.selection import resize as resize
from .discovery.baselines import random_circuit as random_circuit
from .circuits.run import run_circuit as run_circuit

# Is it the model
from .evaluation.completeness import completeness as completeness
from .evaluation.faithfulness import faithfulness_curve as faithfulness_curve
from .evaluation.referee.minimality import minimality as minimality
from .evaluation.referee.judgement import Judgement as Judgement
from .evaluation.referee.referee import referee as referee
from .evaluation.compare import compare_circuits as compare_circuits
from .evaluation.play import Play as Play
from .evaluation.knowledge import knowledge_table as knowledge_table

# What is in it
from .reading.roles import head_roles as head_roles
from .reading.lens import arrival as arrival, lens as lens
from .interventions.encoder import ablate_encoder as ablate_encoder
from .interventions.nodes import ablate_nodes as ablate_nodes

# Change a fact, and ask why one is wrong
from .editing.covariance import covariance as covariance
from .editing.cases import edit_cases as edit_cases
from .editing.edit import edit as edit
from .editing.scores import edit_scores as edit_scores
from .studies.editing_account.comparison import compare_edit as compare_edit
from .studies.hallucination.diagnosis import diagnose as diagnose
from .studies.hallucination.rescue import rescue as rescue
from .tasks.compose import compose as compose, reverse as reverse

# Look at it, and hand it on
from .workbench.graph.page import graph_view as graph_view
from .workbench.graph.widget import CircuitGraph as CircuitGraph
from .workbench.report.judgement import judgement_page as judgement_page, ranking_page as ranking_page
from .workbench.report.write import provenance as provenance, report as report

# What goes wrong
from .errors import (
    CircuitError as CircuitError,
    DataError as DataError,
    KcwbError as KcwbError,
    ModelError as ModelError,
    SettingError as SettingError,
)
from .editing.change import EditError as EditError

__version__: str
