"""In-context learning: which heads a model uses once it is shown examples, and whether it needs them.

Knowledge Circuits (arXiv 2405.17969, section 5) compares the circuit of a relation without and with demonstrations,
finds attention heads that are only in the latter, and ablates them: accuracy falls by far more than without as many
random heads (its Table 2). Here, step by step and with what chance gives:

1. **Circuits** of the same facts without a shot and after k of them, by EAP-IG under mean ablation, cut at the same
   number of edges after dangling ones are dropped. The mean is taken after unrelated text (`kcwb.tasks.shots`), so that
   cutting an edge takes away what the demonstrations brought.
2. **New heads**: heads of the k-shot circuit that the circuit without a shot lacks, both on all facts of D_val and in
   at least 80% of bootstrap resamples of its facts (each circuit anew on the same resample). Shared heads are in both.
3. **Ablation** in the k-shot prompts of D_test: the heads' outputs are set to zero at every position, as in the paper;
   a mean would have to be taken over prompts, and would give each head what it brings on those. Accuracy is Hit@1, the
   share of facts whose answer's first token is the model's first choice; Hit@10 and the loss stand beside it. What
   they are compared with are sets of as many heads drawn from the same layers, new ones excepted
   (`kcwb.statistics.matched_head_sets`). `p` is the share of draws (the new heads counted in) that do at least as much
   harm.
4. **What they read**: END's attention to the demonstrations' objects, subjects and line breaks, and the induction and
   previous-token scores of `kcwb.reading.roles`, beside the circuit's other heads and random ones of the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kcwb.discovery.methods import STEPS, check_size
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed
from kcwb.studies.in_context.ablation import ablate_new, asked_prompts
from kcwb.studies.in_context.accuracy import shot_accuracy
from kcwb.studies.in_context.attention import demonstration_attention, reading_summary
from kcwb.studies.in_context.circuits import ResampledCircuit, context_circuits, heads_with, new_heads
from kcwb.tasks.relations import Relation
from kcwb.tasks.shots import ShotTask, shot_tasks
from kcwb.verbs import verb


@dataclass(frozen=True, eq=False)
class InContext:
    """What `in_context` finds for a relation.

    Attributes
    ----------
    tasks
        (k, kind) -> task.
    accuracy
        See `shot_accuracy`.
    circuits
        `0 shots` and the label of the studied context -> its circuit and resamples.
    nodes
        See `new_heads`.
    ablation
        See `ablate_new`.
    heads, reading
        See `demonstration_attention` and `reading_summary`; empty where no head is new.
    """

    tasks: dict[tuple[int, str], ShotTask]
    accuracy: pd.DataFrame
    circuits: dict[str, ResampledCircuit]
    nodes: pd.DataFrame
    ablation: pd.DataFrame
    heads: pd.DataFrame
    reading: pd.DataFrame

    def named(self, status: str) -> list[str]:
        """The heads with a status of `new_heads`: `new`, `shared`, `gone` or `unsure`."""
        return heads_with(self.nodes, status)


@verb
def in_context(
    model: Model,
    relation: Relation | str,
    k: Count = 3,
    kind: str = "shots",
    *,
    beside: Sequence[tuple[Natural, str]] = (),
    edges: Count = 300,
    n: Count = 8,
    n_test: Natural = 16,
    template: int | str = 0,
    sets: Count = 2,
    steps: Count = STEPS,
    resamples: Count = 100,
    draws: Count = 100,
    seed: Seed = 0,
    unrelated: Sequence[Relation] | None = None,
    progress: Progress = True,
) -> InContext:
    """All of it for one relation: accuracy, circuits, new heads, their ablation, and what they read.

    Parameters
    ----------
    model, relation, k, kind, n, n_test, template, sets, unrelated
        As in `kcwb.tasks.shots.make_shots`; `k` shots, or a control, are compared with none.
    beside
        Further pairs of k and kind whose accuracy is reported.
    edges, steps, resamples
        As in `context_circuits`.
    draws
        As in `ablate_new`.

    Raises
    ------
    DataError, SettingError
        As `make_shots` and the steps raise them.
    """
    check_size(model.graph, edges, model.name)
    wanted = list(dict.fromkeys([(0, "shots"), (k, kind), *beside]))

    def within(note: str) -> Progress:
        told = progress
        if isinstance(told, bool):
            return told
        return lambda done, total, more: told(done, total, f"{note}, {more}" if more else note)

    more = {"n": n, "seed": seed, "template": template, "sets": sets, "n_test": n_test, "unrelated": unrelated}
    tasks = shot_tasks(model, relation, wanted, progress=within("questions"), **more)
    asked_prompts(tasks[k, kind], "test")  # before circuits are looked for
    chosen = {"0 shots": tasks[0, "shots"], tasks[k, kind].label: tasks[k, kind]}
    # 1. circuits
    size = {"edges": edges, "steps": steps, "resamples": resamples, "seed": seed}
    circuits = context_circuits(model, chosen, progress=within("circuits"), **size)
    before, after = circuits.values()
    # 2. new heads
    nodes = new_heads(before, after)
    task, new, shared = tasks[k, kind], heads_with(nodes, "new"), heads_with(nodes, "shared")
    # 3. ablation
    ablation = ablate_new(model, task, new, shared, draws=draws, seed=seed, progress=within("ablation"))
    # 4. what they read
    heads = demonstration_attention(model, task)
    heads["status"] = heads["node"].map(nodes.set_index("node")["status"]).fillna("in neither")
    reading = reading_summary(model, heads, draws=draws, seed=seed)
    return InContext(tasks, shot_accuracy(tasks.values()), circuits, nodes, ablation, heads, reading)
