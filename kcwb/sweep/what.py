"""Many discoveries: every model, relation, method, threshold and ablation, on any `concurrent.futures` executor.

A *cell* is one discovery with all that determines it. Workers compute cells and send them back; the process that called
`sweep` alone writes, each file under a temporary name that is then renamed. So a worker needs no disk in common with
the others, and a kill of any process loses at most the cells that were being computed. A store is a folder:

    sweep.json               says that it is one
    circuits/<digest>.json   the circuit of a finished cell (and its scores beside it)
    cells/<digest>.json      the cell, its numbers or its error; written last, so that what it names is there

where the digest is that of the cell. A finished cell is not computed again; one that failed is.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd

from kcwb.circuits.ablation import AblationKind, ablation_kind
from kcwb.discovery.methods import DEFAULT, METHODS, check_method
from kcwb.errors import DataError, SettingError, nearest, shown
from kcwb.models.loading import known_dtype
from kcwb.models.worker import WORKER, error_words, results
from kcwb.progress import Progress, track
from kcwb.settings import Count, Kind, Positive, Seed, fits
from kcwb.sweep.run import Cell, Outcome, run_cell, run_in_worker
from kcwb.sweep.store import cell_table, check_store, finished, known_weights, open_store, stored_digests, write_cell
from kcwb.tasks.relations import FILES, Relation, load_relation
from kcwb.verbs import verb

if TYPE_CHECKING:
    from distributed import Client


@verb
def sweep(
    models: Sequence[str | Path],
    relations: Sequence[str | Path | Relation],
    methods: Sequence[str] = (DEFAULT,),
    taus: Sequence[Positive] = (0.01,),
    ablations: Sequence[str | AblationKind] | None = None,
    *,
    store: str | Path,
    executor: Executor | None = None,
    metric: str = "nll",
    edges: Count | None = None,
    n: Count = 8,
    seed: Seed = 0,
    template: int | str = 0,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress = True,
) -> pd.DataFrame:
    """Discover a circuit for each combination, and keep all of them in a folder.

    Parameters
    ----------
    models
        Names or folders, as `load_model` takes them; each worker loads the model that it needs, once for all cells of
        that model which follow each other.
    relations
        Relations, names of those that come with the package, or paths of files. Workers need no file: the facts are
        sent.
    methods, taus, ablations
        As in `discover`; `taus` are for methods that take `tau` (acdc), and the others have one cell each.
        `ablations=None`: each method's own.
    store
        The folder. It may hold cells of other sweeps; those asked for that are finished are not computed again.
    executor
        Any `concurrent.futures.Executor`: a `ProcessPoolExecutor` (give it `mp_context` "spawn"), a Dask cluster's
        (`distributed.Client(address).get_executor(pure=False)`), ...; None computes in this process.
    metric, edges, n, seed, template, dtype
        The same for all cells, as in `discover`, `make_task` and `load_model`.
    device
        Of every worker. `"auto"` gives each worker process of a machine a GPU of its own, in turn, or the CPU.
    progress
        Reported per cell.

    Returns
    -------
    DataFrame
        One row per cell, in the order of the arguments; see `read_sweep`.

    Raises
    ------
    SettingError
        If a name is not known, a threshold makes no sense, or another sweep is writing to the store. Nothing is
        computed then.
    DataError
        If a relation cannot be read, or the folder holds something else.
    KcwbError
        If the executor's workers died or its cluster went away. What was finished is in the store: call again.
    """
    shared = {"metric": metric, "edges": edges, "n": n, "seed": seed, "template": template, "dtype": dtype}
    cells = _cells(models, relations, methods, taus, ablations, shared)
    with open_store(Path(store)) as folder:
        known = known_weights(folder)
        missing = [cell for cell in cells if not finished(folder, cell)]
        with track(progress, len(cells), "sweep") as step:
            step(len(cells) - len(missing), "finished before")
            for cell, outcome in _outcomes(executor, missing, device):
                write_cell(folder, cell, _checked(cell, outcome, known))
                step(1, f"{cell.model}, {cell.relation.name}, {cell.method}")
        return cell_table(folder, [cell.digest for cell in cells])


@verb
def read_sweep(store: str | Path) -> pd.DataFrame:
    """Every cell of a store.

    Returns
    -------
    DataFrame
        One row per cell: `model`, `relation`, `template`, `method`, `ablation`, `tau`, `edges`, `metric`, `n`, `seed`,
        `dtype`; `status` (`done` or `failed`) and `error`; `n_edges`, `n_nodes` and `share` (of all edges) of the
        circuit, `facts` in D_val; `hit_val`, `hit_test` (Hit@10 of the circuit alone on D_val and D_test),
        `full_hit_test` (of the full model), `nll_val`, `full_nll_val` (nats); `seconds`, `worker`; and `circuit`, the
        path of its file, missing for one that failed.

    Raises
    ------
    DataError
        If the folder is no store, or a file in it is damaged.
    """
    folder = Path(store)
    check_store(folder)
    return cell_table(folder, stored_digests(folder))


# --- before anything is computed ---


def _cells(
    models: Sequence[str | Path],
    relations: Sequence[str | Path | Relation],
    methods: Sequence[str],
    taus: Sequence[float],
    ablations: Sequence[str | AblationKind] | None,
    shared: Mapping[str, Any],
) -> list[Cell]:
    """All combinations, each once; the model changes most rarely, so that a worker keeps the one that it has."""
    kinds: Sequence[str | AblationKind | None] = [None] if ablations is None else ablations
    given = {"models": models, "relations": relations, "methods": methods, "taus": taus, "ablations": kinds}
    for name, values in given.items():
        if not values:
            raise SettingError(f"{name}={values!r:.60}: give a list of at least one.")
    delivers = _delivers(kinds, methods, shared["metric"])
    known_dtype(shared["dtype"])
    read = [one if isinstance(one, Relation) else load_relation(one) for one in relations]
    for relation in read:
        relation.template(shared["template"])
    cells = {}
    for model, relation, (kind, method) in itertools.product(models, read, delivers):
        takes = METHODS[method].defaults
        of_method = {**shared, "ablation": delivers[kind, method]}
        of_method["edges"] = shared["edges"] if "edges" in takes else None
        for tau in map(float, taus) if "tau" in takes else [None]:
            cell = Cell(str(model), relation, method=method, tau=tau, **of_method)
            cells.setdefault(cell.digest, cell)
    return list(cells.values())


def _delivers(
    kinds: Sequence[str | AblationKind | None], methods: Sequence[str], metric: str
) -> dict[tuple[str | AblationKind | None, str], str]:
    """What cut edges deliver for each ablation and method; SettingError for a combination that cannot be meant."""
    pairs = itertools.product(dict.fromkeys(kinds), dict.fromkeys(methods))
    return {(kind, method): check_method(method, metric, kind).ablation for kind, method in pairs}


# --- computing ---


def _outcomes(executor: Executor | None, cells: Sequence[Cell], device: str) -> Iterator[tuple[Cell, Outcome]]:
    """Each cell with what became of it, as they are done."""
    if executor is None:
        try:
            for cell in cells:
                yield cell, run_cell(cell, device)
        finally:
            WORKER.forget()
        return
    kept = "Finished cells are in the store; the same sweep goes on from there."
    calls = [(cell, device, METHODS[cell.method], type(ablation_kind(cell.ablation))) for cell in cells]
    for number, future in results(executor, run_in_worker, calls, kept):
        error = future.exception()  # on the way, such as of a worker that lacks the package
        failed = None if error is None else Outcome("unknown", None, error=error_words(error))
        yield cells[number], failed or future.result()


def _checked(cell: Cell, outcome: Outcome, known: dict[tuple[str, str], tuple[str, str]]) -> Outcome:
    """The outcome; an error if its worker has other weights under the model's name than those before it."""
    if outcome.model_digest is None:
        return outcome
    digest, worker = known.setdefault((cell.model, cell.dtype), (outcome.model_digest, outcome.worker))
    if digest == outcome.model_digest:
        return outcome
    words = (
        f"ModelError: {cell.model} has weights {outcome.model_digest[:12]} on {outcome.worker}, but {digest[:12]} on "
        f"{worker}. Give all workers the same model, or use another store for other weights."
    )
    return Outcome(outcome.worker, outcome.seconds, error=words)


# --- files and clusters ---

_WHOLE = Annotated[int, Kind("a whole number", lambda value: type(value) is int and abs(value) < 2**63)]
#: What a file may hold, with what it must be.
_FILE_KEYS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("models", "relations", "methods", "ablations"), ("a list of text", list[str])),
    "taus": ("a list of numbers", list[float | _WHOLE]),
    **dict.fromkeys(("store", "metric", "dtype", "device"), ("text", str)),
    **dict.fromkeys(("n", "seed", "edges"), ("a whole number", _WHOLE)),
    "template": ("a whole number or text", str | _WHOLE),
}
#: Parts of a key: tomllib takes time that grows with their square.
_DEEPEST = 100


def read_sweep_file(path: str | Path) -> dict[str, Any]:
    """The arguments of `sweep` from a TOML file; relation files and the store are relative to its folder.

    DataError if it cannot be read, or is not TOML; SettingError if it has an unknown key or a value of another kind, or
    lacks models, relations or store.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if any(part.count(".") > _DEEPEST for part in re.split("[\n=,]", text)):
            raise ValueError(f"a key of more than {_DEEPEST} parts")
        data = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not TOML: {error}.") from error
    for key, value in data.items():
        if key not in _FILE_KEYS:
            raise SettingError(f"{path}: {key!r:.60} is not a setting of a sweep. {nearest(key, _FILE_KEYS)}")
        words, kind = _FILE_KEYS[key]
        if not fits(value, kind):
            raise SettingError(f"{path}: {key} is {shown(value)}; it must be {words}.")
    for key in ("models", "relations", "store"):
        if key not in data:
            raise SettingError(f"{path} lacks {key}.")
    _delivers(data.get("ablations", [None]), data.get("methods", []), data.get("metric", "nll"))
    here = path.parent
    data["relations"] = [str(here / one) if one.endswith(FILES) else one for one in data["relations"]]
    return data | {"store": str(here / data["store"])}


def connect(address: str, timeout: float = 10.0) -> Client:
    """A Dask client of the scheduler at `address`, which has at least one worker that can import this package.

    SettingError if Dask is not installed, no scheduler answers, it has no worker, or a worker has another version of
    the package or none.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingError("--scheduler needs Dask: pip install 'kcwb[cluster]'.") from error
    with contextlib.ExitStack() as refused:
        try:
            client = refused.enter_context(Client(address, timeout=timeout, set_as_default=False))
        except (OSError, ValueError) as error:
            words = f"No Dask scheduler answers at {address} ({error!s:.99}). Start one: dask scheduler."
            raise SettingError(words) from error
        try:
            client.wait_for_workers(1, timeout=timeout)
            versions: Any = client.run(_version)
        except TimeoutError as error:
            words = f"The scheduler at {address} has no worker. Start some: dask worker {address}."
            raise SettingError(words) from error
        except Exception as error:
            words = f"A worker of {address} cannot import kcwb ({error_words(error):.300}). Install it there."
            raise SettingError(words) from error
        for worker, version in versions.items():
            if version != _version():
                raise SettingError(
                    f"The worker {worker} has kcwb {version}; here it is {_version()}. Install the same."
                )
        refused.pop_all()
    return client


def _version() -> str:
    from importlib.metadata import version

    return version("kcwb")
