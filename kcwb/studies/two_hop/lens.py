"""Two hops read layer by layer: is the bridge there before the object is.

If a model takes two hops, the bridge should be there before the object is: at the words that describe it, or at END
(Yang et al., arXiv 2402.16837). After each layer the residual stream is read with the final norm and the unembedding
(`kcwb.reading.trajectories`) at three places of the two-hop prompt: the subject's last token, the description's last
token (where the two differ), and END. A bridge may rank high because all countries do, so beside it stand the bridges
of the other chains, read at the same place of the same prompt; and beside the object theirs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.progress import Progress, track
from kcwb.reading.lens import geometric_mean
from kcwb.reading.positions import rows_told_at_end
from kcwb.reading.trajectories import layer_streams
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.compose import Wording
from kcwb.tasks.hops import Hops
from kcwb.tasks.prompts import KNOWN_RANK, Prompts
from kcwb.tasks.ranks import rank_of
from kcwb.tasks.task import check_same_weights
from kcwb.tasks.tokens import answer_tokens, encode_one
from kcwb.verbs import verb

#: Where the stream is read, and what is looked for there.
PLACES = ("subject", "description", "END")
WHO = ("bridge", "other bridges", "object", "other objects")


@verb
def hop_lens(model: Model, hops: Hops, *, progress: Progress = True) -> pd.DataFrame:
    """Where bridge and object stand in the two-hop prompts of D_val, after each layer.

    Parameters
    ----------
    model, hops
        The full model is run. A chain whose bridge or object begins with the same token as another one of its
        relation is left out with a warning.

    Returns
    -------
    DataFrame
        One row per chain, `layer` (-1 is the embedding), `place` and `who`: `rank`, from 1, and `hit_10`, whether it is
        at most 10. For the others, of which each starts with another token: the geometric mean of their ranks, and the
        share of them with a rank of at most 10; left out where there are none. The place `description` is left out for
        a chain whose description ends with its subject.
    """
    task = hops.tasks["two-hop"]
    check_same_weights(model, task)
    told = rows_told_at_end(task.val, hops.tasks["hop 1"].val)
    prompts, chains = task.val.select(told), hops.chains.iloc[told].reset_index(drop=True)
    asked = zip(prompts.facts, chains["bridge"], strict=True)
    firsts = [answer_tokens(model, task.template, fact.subject, bridge, fact.space)[0] for fact, bridge in asked]
    bridges = torch.tensor(firsts, device=model.device)
    objects = prompts.answers[:, 0]
    places = _places(model, prompts, hops.wording)

    @torch.no_grad()
    def work(rows: slice) -> pd.DataFrame:
        parts = []
        for layer, residual in enumerate(layer_streams(model.network, prompts.tokens[rows]), start=-1):
            for place, at in places.items():
                some = [(i, position) for i in range(rows.start, rows.stop) if (position := at[i]) is not None]
                if some:
                    streams = torch.stack([residual[i - rows.start, position] for i, position in some])
                    found = _read(model, streams, [i for i, _ in some], bridges, objects)
                    parts.append(found.assign(layer=layer, place=place))
            step(rows.stop - rows.start)
        return pd.concat(parts)

    with track(progress, len(prompts) * (model.graph.n_layers + 1), "bridge lens") as step:
        table = pd.concat([*by_prompts(model.network, prompts.tokens, work)])
    table = table.join(chains, on="chain")
    order = ["subject", "bridge", "object", "layer", "place", "who", "rank", "hit_10"]
    table["place"] = pd.Categorical(table["place"], PLACES)
    table["who"] = pd.Categorical(table["who"], WHO)
    table = table.sort_values(["place", "who", "layer"], kind="stable")
    return table.astype({"place": str, "who": str})[order].reset_index(drop=True)


@verb
def lens_summary(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means of the table of `hop_lens` over chains, ready for `kcwb.workbench.plots.plot_lens`.

    Returns
    -------
    DataFrame
        One row per `place`, `quantity`, `who` and `layer`: `value`, `low`, `high`, `facts`. The quantities are `rank`,
        the geometric mean, and `hit_10`, the share. `low` and `high` are the 95% bootstrap interval of the mean over
        chains; for `hit_10` of a chain's own bridge or object, the 95% Wilson interval of the share of chains.
    """
    rows = []
    for (place, who, layer), some in table.groupby(["place", "who", "layer"], sort=False):
        hits = some["hit_10"].to_numpy(dtype=float)
        ends = mean_interval(hits, seed) if str(who).startswith("other") else proportion_interval(hits)
        rank = geometric_mean(some["rank"], seed)
        rows += [
            (place, "rank", who, layer, *rank, len(some)),
            (place, "hit_10", who, layer, hits.mean(), *ends, len(some)),
        ]
    columns = ["place", "quantity", "who", "layer", "value", "low", "high", "facts"]
    return pd.DataFrame(rows, columns=columns).sort_values(["place", "quantity"], kind="stable", ignore_index=True)


@verb
def hop_arrival(table: pd.DataFrame) -> pd.DataFrame:
    """In which layer bridge and object of each chain are first among the ten likeliest tokens.

    Parameters
    ----------
    table
        As of `hop_lens`.

    Returns
    -------
    DataFrame
        One row per chain: `subject`, `bridge`, `object`; `bridge_before`, the first layer in which the bridge is there
        at the subject or the description; `bridge_at_end` and `object_at_end`, the same at END; missing (NA) where it
        never is. `advantage`: by which factor the best rank that the bridge reaches before END is better than that of
        the other bridges there, in powers of ten (NaN without others).
    """
    rows = []
    for key, some in table.groupby(["subject", "bridge", "object"], sort=False):
        at_end = some["place"] == "END"

        def first(part: pd.DataFrame) -> object:
            hits = part.loc[part["hit_10"] >= 1, "layer"]
            return hits.min() if len(hits) else pd.NA

        before = some[~at_end]
        best = before.groupby("who")["rank"].min()
        advantage = math.log10(best["other bridges"] / best["bridge"]) if "other bridges" in best else math.nan
        by_who = {who: some[at_end & (some["who"] == who)] for who in ("bridge", "object")}
        rows.append(
            (*key, first(before[before["who"] == "bridge"]), *(first(part) for part in by_who.values()), advantage)
        )
    columns = ["subject", "bridge", "object", "bridge_before", "bridge_at_end", "object_at_end", "advantage"]
    found = pd.DataFrame(rows, columns=columns)
    return found.astype(dict.fromkeys(columns[3:6], "Int64"))


def _places(model: Model, prompts: Prompts, words: Wording) -> dict[str, list[int | None]]:
    """The position of each place in every two-hop prompt; None where it is another place, too."""
    subject = (prompts.subject_stop - 1).tolist()
    ends = prompts.ends.tolist()
    described = []
    for fact in prompts.facts:
        whole = replace(fact, subject=words.description.replace("{}", fact.subject))
        described.append(encode_one(model, whole, words.question).stop - 1)  # the same prompt, its span being this one
    return {
        "subject": [None if s == end else s for s, end in zip(subject, ends, strict=True)],
        "description": [None if d in (s, end) else d for s, d, end in zip(subject, described, ends, strict=True)],
        "END": [*ends],
    }


def _read(
    model: Model, streams: Float[Tensor, "n D"], rows: list[int], bridges: Int[Tensor, " N"], objects: Int[Tensor, " N"]
) -> pd.DataFrame:
    """Ranks at one place after one layer, for the chains `rows`."""
    logits, parts = model.network.logits(streams).float(), []
    for (own_name, other_name), tokens in ((WHO[:2], bridges), (WHO[2:], objects)):
        every = tokens.unique()
        ranks = torch.stack([rank_of(logits, token.expand(len(rows))) for token in every], -1).double()
        own = tokens[rows][:, None] == every[None]
        for who, chosen in ((own_name, own), (other_name, ~own)):
            count = chosen.sum(-1)
            if not bool(count.all()):  # there are no others
                continue
            # of one rank the mean is itself, to the last digit
            rank = (ranks * chosen).sum(-1) if who == own_name else ((ranks.log() * chosen).sum(-1) / count).exp()
            hit = ((ranks <= KNOWN_RANK) & chosen).sum(-1) / count
            parts.append(pd.DataFrame({"chain": rows, "who": who, "rank": rank.tolist(), "hit_10": hit.tolist()}))
    return pd.concat(parts)
