"""The commands: `kcwb relations`, `models`, `discover`, `completeness`, `sweep`, `report`, `world`.

`kcwb.console` says what a command is; `kcwb referee` is in `kcwb.commands_referee`.
"""

from __future__ import annotations

import argparse
import contextlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kcwb
from kcwb.console import (
    AS_FILE,
    FORCE,
    RUNNING,
    as_table,
    command,
    given_of,
    hushed,
    load,
    option,
    records,
    remade,
    say,
    selection_of,
    template_of,
)
from kcwb.errors import DataError, SettingError, choose
from kcwb.outputs import CIRCUIT, check_output, same_text, settle
from kcwb.tasks.relations import load_relation, relation_files
from kcwb.workbench.report.run import read_parameters

_SELF_CHECK = (
    "self-check at load: every head and MLP computes what it does in Hugging Face's own code; the residual stream is "
    "the sum of its senders; with all edges kept, every node reads that stream; with all cut under resample ablation, "
    "that of the corrupted run. A model that fails is refused."
)
_WORKS = ("edges", "nodes", "roles", "editing")
_STRONGEST = 10


@command(option("--folder", type=Path, help="a folder of relation files of your own, in the LRE format"))
def relations(args: argparse.Namespace) -> tuple[Any, str]:
    """List the relations that come with the package, or those of a folder.

    The table shows how many zero-shot templates there are and the first, which is number 0; --json shows all.
    """
    files = relation_files(args.folder)
    if not files:
        raise DataError(f"The folder {args.folder} holds no .json file, so no relation.")
    data = []
    for path in files.values():
        one = load_relation(path)
        data.append({"name": one.name, "type": one.relation_type, "facts": len(one.facts)})
        data[-1] |= {"templates": list(one.prompt_templates_zs), "file": str(path)}
    rows = [list((row | {"templates": f"{len(row['templates'])}: {row['templates'][0]}"}).values()) for row in data]
    headers = ("name", "type", "facts", "zero-shot templates", "file")
    return data, as_table(headers if args.folder else headers[:-1], rows)


@command()
def models(args: argparse.Namespace) -> tuple[Any, str]:
    """List the built-in model and the families that are covered: what works on each, and how it is checked."""
    from kcwb.models.builtin import builtin_state
    from kcwb.models.families import ENCODERS, FAMILIES

    built_in = builtin_state()
    families: list[dict[str, Any]] = [
        {"family": one.name, "model_type": kind}
        | {key: getattr(one, key) for key in (*_WORKS, "checked", "note")}
        | {"examples": list(one.examples)}
        for kind, one in (FAMILIES | ENCODERS).items()
    ]
    rows = [
        (row["family"], *("yes" if row[key] else "no" for key in _WORKS), row["checked"], ", ".join(row["examples"]))
        for row in families
    ]
    table = as_table(("family", *_WORKS, "tested on a", "examples, by their names on the Hugging Face hub"), rows)
    notes: dict[str, list[str]] = {}
    for row in families:
        notes.setdefault(row["note"], []).append(row["family"])
    said = "".join(f"\n{', '.join(names)}: {note}." for note, names in notes.items() if note)
    start = f"{built_in['name']} (built in, works offline): {built_in['state']}"
    text = f"{start}\n\n{table}\n{said}\n\nChecked, beside tests, by {_SELF_CHECK}"
    return {"built_in": built_in, "families": families, "check": _SELF_CHECK}, text


@command(
    option("relation", metavar="RELATION", help="the name of a relation (see kcwb relations), or a .json file"),
    option("--model", default="smollm2-135m", help="built-in name, hub name or local folder (default: %(default)s)"),
    option(
        "--method",
        help="eap, eap-ig, eap-ig-activations, ceap, gim, relp, ig-prune, edge-pruning, exact, acdc (default: gim)",
    ),
    option("--metric", help="the loss that a cut is judged by: nll, kl (not for eap) or logit_diff (default: nll)"),
    option("--ablation", help="zero, mean, resample, or name(setting=value) (default: mean; acdc: zero or as within)"),
    option("--edges", type=int, help="attribution: how many edges (default: 1%% of all); dangling ones are dropped"),
    option("--threshold", type=float, help="attribution: the least score kept, in nats, instead of --edges"),
    option(
        "--select",
        type=selection_of,
        help="attribution: signed, absolute, a number between (0 to 1), tuned, greedy or optimal (default: tuned)",
    ),
    option("--steps", type=int, help="of eap-ig and its kind, points of the integral (default: 5; relp: 1)"),
    option("--tau", type=float, help="acdc: the loss increase below which an edge is cut (default: 0.01 nats)"),
    option("--absolute", action="store_true", default=None, help="acdc: judge the increase by its absolute value"),
    option("--within", metavar="CIRCUIT", help="acdc: search only this file's edges, or those of e.g. gim:2000"),
    option("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a method's own setting"),
    option("--facts", type=int, default=8, help="known facts to discover on (default: %(default)s)"),
    option("--seed", type=int, default=0, help="of the draw of facts (default: %(default)s)"),
    option(
        "--template", type=template_of, default=0, help="a zero-shot template's number (default: 0), or text with {}"
    ),
    option("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)"),
    option("--out", type=Path, help="write the circuit to this .json file, and all scores beside it"),
    FORCE,
    *RUNNING,
)
def discover(args: argparse.Namespace) -> tuple[Any, str]:
    """Find the circuit with which a model answers facts of a relation."""
    relation = load_relation(args.relation)
    if args.out is not None:  # what cannot be written there is told before anything is computed
        if args.out.suffix != ".json":
            raise SettingError(f"--out {args.out}: the name of a circuit's file ends in .json.")
        inputs = [Path(path) for path in (args.relation, args.within) if path is not None]
        check_output(args.out, CIRCUIT, what="--out", inputs=inputs, force=args.force)
    from kcwb.circuits.ablation import ABLATIONS
    from kcwb.discovery.discover import discover
    from kcwb.discovery.methods import DEFAULT, METHODS, check_method, load_extensions
    from kcwb.discovery.selection import SELECTIONS
    from kcwb.tasks.metrics import METRICS
    from kcwb.tasks.task import make_task
    from kcwb.verbs import check_settings

    load_extensions()
    # Misspelt names are told before a model is loaded; discover checks the rest.
    given = given_of(args, "ablation", "edges", "threshold", "select", "steps", "tau", "absolute")
    given |= {"method": args.method or DEFAULT, "metric": args.metric or "nll"} | dict(read_parameters(args.set))
    if args.within is not None:
        circuit = Path(args.within)
        given["within"] = kcwb.Circuit.load(circuit) if circuit.suffix or ":" not in args.within else args.within
    for name, known in {"method": METHODS, "metric": METRICS, "ablation": ABLATIONS, "select": SELECTIONS}.items():
        if isinstance(given.get(name), str):
            choose(f"--{name}", given[name].partition("(")[0], known)
    check_method(**given)
    check_settings(make_task, n=args.facts, seed=args.seed)
    relation.template(args.template)
    model = load(args, args.model, args.dtype)
    task = make_task(model, relation, n=args.facts, seed=args.seed, template=args.template)
    circuit = discover(model, task, progress=not args.quiet, **given)
    if args.out is not None:
        args.out = settle(args.out, CIRCUIT, force=args.force)
        circuit.save(args.out, force=args.force)
    if not circuit.n_edges:
        say("warning: the circuit is empty: no chosen edge is on a path from input to logits. Ask for more edges.")
    origin, edges = circuit.provenance, records(circuit.edges)
    data = {"n_edges": circuit.n_edges, "n_nodes": circuit.n_nodes, "out": args.out and str(args.out)}
    data |= {"provenance": origin, "edges": edges}
    table = as_table(("sender", "receiver", "score"), [list(edge.values()) for edge in edges[:_STRONGEST]], digits=4)
    where = "Not written to a file; --out circuit.json does." if args.out is None else f"Written to {args.out}"
    return data, f"{circuit} in {model.name}, {origin['seconds']:.1f} s\n\n{table}\n\n{where}"


@command(
    option("circuit", metavar="CIRCUIT.json", type=Path, help="a file that kcwb discover --out wrote"),
    option("--draws", type=int, default=10, help="random circuits to compare with (default: %(default)s)"),
    option("--k", type=int, default=10, help="a hit is an answer among the k most likely (default: %(default)s)"),
    *AS_FILE,
    option("--facts", type=int, help="facts in D_val"),
    option("--seed", type=int, help="of the draw of facts, the random circuits and the intervals"),
    *RUNNING,
)
def completeness(args: argparse.Namespace) -> tuple[Any, str]:
    """Run a circuit alone, beside the full model, the empty circuit and random circuits.

    Hit@k and its 95% interval (Wilson's, of the share of facts; of random circuits the bootstrap's, of the mean), on
    the facts that the circuit was found on (D_val) and on others (D_test).
    """
    from kcwb.circuits.ablation import ablation_kind
    from kcwb.discovery.methods import load_extensions
    from kcwb.evaluation.completeness import completeness
    from kcwb.tasks.task import make_task
    from kcwb.verbs import check_settings

    load_extensions()
    circuit = kcwb.Circuit.load(args.circuit)
    check_settings(completeness, k=args.k, draws=args.draws)  # told before a model is loaded
    ablation_kind(args.ablation or circuit.ablation)
    relation, said = remade(circuit.provenance, args.circuit, args)
    model = load(args, said["model"], said["dtype"], said["prepend_bos"])
    task = make_task(model, relation, n=said["facts"], seed=said["seed"], template=said["template"])
    more = {"ablation": args.ablation, "k": args.k, "draws": args.draws, "seed": said["seed"]}
    data = records(completeness(model, circuit, task, progress=not args.quiet, **more))
    keys = ("run", "split", "edges", "nodes", "n", "hit", "low", "high", "nll")
    rows = [[round(row[key]) if key == "nodes" else row[key] for key in keys] for row in data]
    table = as_table((*keys[:4], "facts", f"Hit@{args.k}", *keys[6:]), rows)
    return data, f"{circuit} in {model.name}: {task.template}\n\n{table}"


@command(
    option("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="a notebook, which is not changed; or several"),
    option("-o", "--output", type=Path, help="the HTML file (default: the notebook's name, in this folder)"),
    option("--out", type=Path, metavar="FOLDER", help="a folder for the pages of all notebooks, and their index.html"),
    option("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter of the notebook"),
    option("--pdf", action="store_true", help="also write a PDF, with Chromium"),
    option("--hide-code", action="store_true", help="leave the code out"),
    FORCE,
    option("--quiet", action="store_true", help="no progress bar"),
)
def report(args: argparse.Namespace) -> tuple[Any, str]:
    """Run notebooks with parameters and write each as one HTML file that opens without a network."""
    from kcwb.workbench.report.series import series
    from kcwb.workbench.report.write import report

    parameters = read_parameters(args.p)
    if (args.out is None and len(args.notebooks) > 1) or (args.out and args.output):
        raise SettingError("Pages of several notebooks go to a folder, --out FOLDER; that of one to a file, -o FILE.")
    more: dict[str, Any] = {"hide_code": args.hide_code, "force": args.force, "progress": not args.quiet}
    if args.out is None:
        path = report(args.notebooks[0], args.output, parameters, pdf=args.pdf or None, **more)
    else:
        path = series(args.notebooks, args.out, parameters, pdf=args.pdf, **more)
    return {"output": str(path), "parameters": parameters}, f"Written to {path}"


@command(
    option("file", type=Path, metavar="SWEEP.toml", help="models, relations, methods, taus, ablations, store, ..."),
    option("--scheduler", metavar="ADDRESS", help="compute on the workers of a Dask scheduler, tcp://host:8786"),
    option("--workers", type=int, metavar="N", help="compute in N processes of this machine (default: in this one)"),
    option("--quiet", action="store_true", help="show no progress on stderr"),
)
def sweep(args: argparse.Namespace) -> tuple[Any, str]:
    """Find many circuits: every model, relation, method, threshold and ablation of a file.

    The circuits are kept in the store that the file names, and cells that are finished there are not computed again. An
    example of a file: models = ["smollm2-135m"], relations = ["country_capital"], methods = ["eap-ig"], ablations =
    ["mean"], store = "results", each on a line; taus, metric, edges, n, seed, template, dtype and device are optional.
    Relation files and the store are relative to the file.
    """
    if args.scheduler is not None and args.workers is not None:
        raise SettingError("Give either --scheduler or --workers, not both.")
    if args.workers is not None and args.workers < 1:
        raise SettingError(f"--workers {args.workers}: there is at least one.")
    from kcwb.discovery.methods import load_extensions
    from kcwb.sweep.what import read_sweep_file, sweep

    load_extensions()
    settings = read_sweep_file(args.file)
    with contextlib.ExitStack() as stack, hushed(args):
        table = sweep(**settings, executor=_executor(args, stack), progress=not args.quiet)
    data = records(table)
    failed = [row for row in data if row["status"] == "failed"]
    keys = ("model", "relation", "method", "ablation", "tau", "status", "n_edges", "hit_val", "hit_test", "seconds")
    rows = [[int(row[key]) if key == "n_edges" and row[key] is not None else row[key] for key in keys] for row in data]
    text = f"{len(data) - len(failed)} of {len(data)} cells are done, in {settings['store']}\n\n{as_table(keys, rows)}"
    for row in failed:
        text += f"\n\n{row['model']}, {row['relation']}, {row['method']} failed on {row['worker']}: {row['error']}"
    return data, text


@command(
    option("--architectures", nargs="+", metavar="NAME", help="some of gpt2, llama, opt, bert (default: all)"),
    option("--seed", type=int, default=0, help="of the world, the first weights and the batches (default: 0)"),
    option("--steps", type=int, help="updates of each model's weights (default: enough to know the facts)"),
    option("--relations", type=Path, metavar="FOLDER", help="also write the world's relations to files in this folder"),
    FORCE,
    option("--quiet", action="store_true", help="show no progress on stderr"),
)
def world(args: argparse.Namespace) -> tuple[Any, str]:
    """Train tiny models of several architectures on one small world of invented facts, or find them.

    People, cities, countries and languages: some minutes on two cores, once; then the models lie in the user's cache.
    The table says where, and which share of the facts each knows. --relations writes what kcwb discover asks for.
    """
    from kcwb.world.facts import make_world
    from kcwb.world.models import ARCHITECTURES, Recipe, load_world, train_world, world_knowledge

    names, facts = args.architectures or ARCHITECTURES, make_world(args.seed)
    steps = {} if args.steps is None else {"steps": args.steps, "encoder_steps": args.steps}
    recipe = Recipe(seed=args.seed, **steps)
    if args.relations is not None:
        for name, relation in facts.relations.items():
            path, same = args.relations / f"{name}.json", same_text(relation.to_json())
            check_output(path, same, what="--relations", force=args.force, make_folder=True)
    folders = train_world(names, world=facts, recipe=recipe, progress=not args.quiet)
    if args.relations is not None:
        facts.save(args.relations)
    data = []
    for name, folder in folders.items():
        known = world_knowledge(load_world(folder, device="cpu"), facts, seed=args.seed)
        data.append({"architecture": name, "folder": str(folder), "known": records(known)})
    rows = [[one["architecture"], *(kind["known"] for kind in one["known"]), one["folder"]] for one in data]
    table = as_table(("model", *(kind["kind"] for kind in data[0]["known"]), "folder"), rows)
    count = sum(len(relation.facts) for relation in facts.relations.values())
    return data, f"{count} facts, {len(facts.sentences)} sentences. Answers that are the first choice:\n\n{table}"


def _executor(args: argparse.Namespace, stack: contextlib.ExitStack) -> Any:
    """What a sweep is computed by: a cluster, processes, or None for this process."""
    if args.scheduler is not None:
        from kcwb.sweep.what import connect

        return stack.enter_context(connect(args.scheduler)).get_executor(pure=False)
    if args.workers is not None:
        from kcwb.models.worker import leave_with_parent

        workers = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=leave_with_parent)
        return stack.enter_context(workers)
    return None
