"""The command `kcwb referee`: is the circuit in a file one? See `kcwb.console` for what a command is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcwb.console import AS_FILE, FORCE, RUNNING, as_table, command, given_of, load, option, records, remade
from kcwb.errors import SettingError, choose

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble
    from kcwb.evaluation.referee.judgement import Judgement
    from kcwb.models.loading import Model
    from kcwb.tasks.task import Task

_KEYS = ("question", "metric", "verdict", "effect", "low", "high", "holm", "power")


@command(
    option("file", nargs="?", type=Path, metavar="FILE", help="a circuit or an ensemble: ours, MIB's JSON, or a .gv"),
    option("--compare", nargs="+", type=Path, default=[], metavar="FILE", help="rank these too, on the same facts"),
    option("-o", "--output", type=Path, metavar="PAGE.html", help="write all that was found as one offline page"),
    option("--quick", action="store_true", help="less of each test, in a fraction of the time"),
    *AS_FILE,
    option("--facts", dest="most", type=int, metavar="N", help="judge on at most N facts (default: 100; quick: 12)"),
    option("--seed", dest="start", type=int, default=0, metavar="SEED", help="of the referee's draws (default: 0)"),
    option("--metric", help="what shares and costs are measured by: nll (the default) or logit_diff"),
    FORCE,
    *RUNNING,
)
def referee(args: argparse.Namespace) -> tuple[Any, str]:
    """Ask of a circuit all that a referee would ask, with tests; of several, which stands best.

    It is judged on facts that the model knows and that the circuit, as far as its file says, was not found on.
    A FILE may be of kcwb, of MIB (arXiv 2504.13151) or of Knowledge Circuits (arXiv 2405.17969). The last two do not
    say which model and relation they are of: name them with --model and --relation.
    """
    files = [*([args.file] if args.file else []), *args.compare]
    names = _names(files)
    from kcwb.evaluation.referee.referee import referee as judge
    from kcwb.verbs import check_settings
    from kcwb.workbench.report.judgement import check_page, judgement_page, ranking_page

    # What cannot be meant, or written there, is told before anything is computed.
    more = given_of(args, "metric", "ablation") | {"quick": args.quick, "progress": not args.quiet}
    more |= {"facts": args.most, "seed": args.start}
    check_settings(judge, **more)
    if args.output is not None:
        inputs = [*files, *([args.relation] if args.relation else [])]
        check_page(args.output, inputs=inputs, force=args.force)
    model, read, task = _read(args, files)
    circuits = {name: read[path] for name, path in zip(names, files, strict=True)}
    if len(files) == 1:
        (circuit,) = circuits.values()
        judgement = judge(model, circuit, task, **more)
        rows = [[row[key] for key in _KEYS] for row in records(judgement.questions)]
        table, sentences = as_table(_KEYS, rows, digits=3), "\n".join(judgement.questions["sentence"])
        data, text = _data(judgement), f"{circuit!r} in {model.name}: {task.template}\n\n{table}\n\n{sentences}"
        write = partial(judgement_page, judgement)
    else:
        from kcwb.evaluation.referee.compare import rank_circuits

        ranking, judgements = rank_circuits(model, circuits, task, **more)
        rows = records(ranking)
        data = {"ranking": rows, "judgements": {name: _data(one) for name, one in judgements.items()}}
        asked = {question for one in judgements.values() for question in one.answers.index}
        keys = [name for name in ranking.columns if name not in asked]  # all verdicts would fill no terminal's line
        table = as_table(keys, [[row[key] for key in keys] for row in rows])
        text = f"{len(circuits)} circuits in {model.name}: {task.template}\n\n{table}"
        write = partial(ranking_page, ranking, judgements)
    if args.output is None:
        return data | {"output": None}, f"{text}\n\nNo page is written; -o page.html does."
    written = write(args.output, force=args.force)
    return data | {"output": str(written)}, f"{text}\n\nWritten to {written}"


def _read(args: argparse.Namespace, files: Sequence[Path]) -> tuple[Model, dict[Path, Circuit | Ensemble], Task]:
    """The model, what the files hold, and the task that all are judged on; misspelt names are told first."""
    from kcwb.circuits.ablation import ABLATIONS
    from kcwb.circuits.files import file_kind, read_any
    from kcwb.circuits.run import check_same_model
    from kcwb.discovery.methods import load_extensions
    from kcwb.tasks.metrics import METRICS
    from kcwb.tasks.task import make_task

    load_extensions()
    metrics = [name for name in METRICS if name != "kl"]  # of which no share is gained
    for name, known in {"metric": metrics, "ablation": ABLATIONS}.items():
        for given in given_of(args, name).values():
            choose(f"--{name}", given.partition("(")[0], known)
    drawings = [path for path in files if file_kind(path) == "gv"]
    read = {path: read_any(path) for path in files if path not in drawings}
    told = [(path, read[path].provenance if path in read else {}) for path in files]
    where, provenance = next((one for one in told if {"model", "relation"} <= set(one[1])), told[0])
    relation, said = remade(provenance, where, args)
    model = load(args, said["model"], said["dtype"], said["prepend_bos"])
    read |= {path: read_any(path, model.graph) for path in drawings}
    for circuit in read.values():
        check_same_model(model, circuit)
    return model, read, make_task(model, relation, n=said["facts"], seed=said["seed"], template=said["template"])


def _names(files: Sequence[Path]) -> list[str]:
    """What to call the circuits: their files' names, or paths where two names are one."""
    if not files:
        raise SettingError("Give the FILE of a circuit, or several after --compare.")
    if len(set(files)) < len(files):
        raise SettingError(f"{next(path for path in files if files.count(path) > 1)} is named twice.")
    stems = [path.stem for path in files]
    return stems if len(set(stems)) == len(stems) else list(map(str, files))


def _data(judgement: Judgement) -> dict[str, Any]:
    return json.loads(judgement.to_json(), parse_constant=lambda _: None)
