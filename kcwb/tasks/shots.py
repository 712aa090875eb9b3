"""In-context learning: the same questions after k demonstrations, and after controls of the same length.

A prompt is a question in one of the relation's several-shot templates, after k lines that answer it for other subjects:

    The capital of Peru is Lima
    The capital of Japan is Tokyo
    The capital of France is

Beside the demonstrations (`shots`) stand two controls: `shuffled`, the same lines with one another's objects, so that
no line is true, and `unrelated`, sentences of other relations that name nothing of this one, cut at the front to
*exactly* as many tokens.

Everything but what stands before the question is the same for every k and kind, so that results are paired: the facts
that are shown are drawn first and never asked; D_val holds facts that the model knows with no shot at all; each fact is
dealt to one of a few sets of demonstrations, of which k shots are the first k.

**What mean ablation averages over.** All k-shot prompts of a relation have its demonstrations in common. A mean over
them would hold what the demonstrations bring, and a cut edge would go on delivering it. So the reference prompts of
every task are questions after *unrelated* text of the same length, another text for each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from kcwb.errors import DataError, choose
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed
from kcwb.tasks.demonstrations import GROUPS, Context, UnrelatedText, deranged
from kcwb.tasks.prompts import Prompts, assemble, draw_partners, encode, known_rows
from kcwb.tasks.relations import Relation, load_relation, require_subjects
from kcwb.tasks.task import Task, split
from kcwb.tasks.tokens import encode_one, objects_after, told_apart
from kcwb.verbs import verb

KINDS = ("shots", "shuffled", "unrelated")
_SHOWN = 16  # facts that are set aside to be shown, at most a third of the relation's
_REFERENCE_SIZE = 16


def label_of(k: int, kind: str) -> str:
    """A name for a context, as in `ShotTask.label`."""
    return "1 shot" if (k, kind) == (1, "shots") else f"{k} {kind}"


@dataclass(frozen=True, eq=False)
class ShotTask(Task):
    """A Task whose questions stand after demonstrations; `template` is the question after the first set of them.

    Attributes
    ----------
    k, kind
        How many demonstrations; `shots`, `shuffled` or `unrelated`.
    question
        The template of the question alone.
    contexts
        The sets of demonstrations. Each prompt's text begins with one of them.
    """

    k: int
    kind: str
    question: str
    contexts: tuple[Context, ...]

    @property
    def label(self) -> str:
        """A name for tables: `1 shot`, `3 shots`, `3 shuffled`, `3 unrelated`."""
        return label_of(self.k, self.kind)

    def context_of(self, prompts: Prompts) -> list[int]:
        """Which of `contexts` each of this task's prompts begins with."""
        found = []
        for text, fact in zip(prompts.texts, prompts.facts, strict=True):
            before = text.removesuffix(self.question.replace("{}", fact.subject))
            found.append([context.text for context in self.contexts].index(before))
        return found

    def groups(self, model: Model, prompts: Prompts) -> Bool[Tensor, "G N T"]:
        """Which positions belong to which of `GROUPS`; each up to END belongs to one, each after it to none.

        Demonstrated objects and subjects, the line breaks between demonstrations, their other words, the first token
        of the prompt (where attention rests that has nothing to do) and the question.
        """
        groups = torch.zeros(len(GROUPS), *prompts.tokens.shape, dtype=torch.bool)
        for row, (text, place) in enumerate(zip(prompts.texts, self.context_of(prompts), strict=True)):
            offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            first = int(prompts.lengths[row]) - len(offsets)  # 1 where the model wants BOS
            context = self.contexts[place]
            for position, (start, stop) in enumerate(offsets, start=first):
                group = context.group(start, stop)
                groups[GROUPS.index("first" if position == 0 else group), row, position] = True
            groups[GROUPS.index("first"), row, :first] = True
        return groups.to(prompts.tokens.device)


@verb
def make_shots(
    model: Model,
    relation: Relation | str,
    k: Natural,
    kind: str = "shots",
    *,
    n: Count = 8,
    seed: Seed = 0,
    template: int | str = 0,
    sets: Count = 2,
    n_test: Natural | None = None,
    unrelated: Sequence[Relation] | None = None,
    progress: Progress = False,
) -> ShotTask:
    """A task of questions after k demonstrations, or after a control.

    Parameters
    ----------
    model, relation, n, seed, n_test, progress
        As in `kcwb.make_task`. Facts are known if the model knows them with no shot.
    k
        How many demonstrations; with 0 there is no context, whatever the kind.
    kind
        `shots`; `shuffled`, the demonstrations with one another's objects; `unrelated`, other text of exactly as many
        tokens.
    template
        The index of one of the relation's several-shot templates (`prompt_templates`), or a template with `{}`.
    sets
        How many sets of demonstrations there are. Facts are dealt to them in turn.
    unrelated
        The relations whose sentences unrelated text is made of; None for all others that come with the package.

    Returns
    -------
    ShotTask
        With the same subjects in D_val and D_test for every `k` and `kind`. None of them is ever shown.

    Raises
    ------
    DataError
        If the relation is made of whole prompts, more facts are to be shown than can be set aside, a prompt does not
        fit into the context (all before anything is computed), the model knows none of the facts, or no unrelated text
        of the length can be made.
    SettingError
        If a setting cannot be meant.
    """
    wanted = [(k, kind)]
    tasks = shot_tasks(
        model, relation, wanted, n=n, seed=seed, template=template, sets=sets, n_test=n_test, unrelated=unrelated,
        progress=progress,
    )  # fmt: skip
    return tasks[k, kind]


@verb
def shot_tasks(
    model: Model,
    relation: Relation | str,
    wanted: Sequence[tuple[Natural, str]] = tuple((k, "shots") for k in (0, 1, 3, 5)),
    *,
    n: Count = 8,
    seed: Seed = 0,
    template: int | str = 0,
    sets: Count = 2,
    n_test: Natural | None = None,
    unrelated: Sequence[Relation] | None = None,
    progress: Progress = False,
) -> dict[tuple[int, str], ShotTask]:
    """Several tasks of `make_shots` at once, which ask the model only once what it knows.

    Parameters
    ----------
    wanted
        Pairs of `k` and `kind`. Other parameters, and what is raised, are those of `make_shots`.

    Returns
    -------
    dict
        (k, kind) -> task, in the order of `wanted`.
    """
    relation = load_relation(relation)
    require_subjects(relation, "A prompt with demonstrations")
    for _, kind in wanted:
        choose("The kind of context", kind, KINDS)
    text = relation.template(template, shots=True)
    deal = _Deal(model, relation, text, seed, sets, unrelated)
    for k, kind in dict.fromkeys(wanted):
        deal.check_length(k, deal.contexts(k, "shots" if kind == "unrelated" else kind))
    contexts = {(k, kind): deal.contexts(k, kind) for k, kind in dict.fromkeys(wanted)}

    zero = encode(model, deal.asked, text, relation.objects, seed, progress=progress)
    known = known_rows(model, zero.ranks, f"{relation.name} that are asked in {text!r:.120}", ", no shot")
    rows = split(known, len(zero), n, seed, n_test)
    partners = draw_partners(zero.lengths.tolist(), zero.own, zero.firsts, random.Random(seed))
    reference_rows = rows.reference[:_REFERENCE_SIZE]
    references = {k: deal.reference(k, zero, reference_rows, partners) for k, _ in contexts}
    tasks = {}
    for (k, kind), some in contexts.items():
        before = [some[i % sets].text for i in range(len(zero))]
        tasks[k, kind] = ShotTask(
            model_name=model.name,
            model_digest=model.digest,
            relation=relation,
            template=some[0].text + text,
            n=n,
            seed=seed,
            val=deal.prompts(zero, rows.val, before, partners),
            test=deal.prompts(zero, rows.test, before, partners) if rows.test else zero.select([]),
            reference=references[k],
            n_known=len(known),
            n_facts=len(zero),
            k=k,
            kind=kind,
            question=text,
            contexts=some,
        )
    return tasks


class _Deal:
    """Which facts are shown and which are asked, and the prompts that follow."""

    def __init__(
        self,
        model: Model,
        relation: Relation,
        text: str,
        seed: int,
        sets: int,
        unrelated: Sequence[Relation] | None,
    ) -> None:
        self.model, self.relation, self.text, self.seed, self.sets = model, relation, text, seed, sets
        order = list(range(len(relation.facts)))
        random.Random(seed).shuffle(order)
        n_shown = min(_SHOWN, len(order) // 3)
        self.shown = [relation.facts[i] for i in order[:n_shown]]
        self.asked = told_apart(model, [relation.facts[i] for i in sorted(order[n_shown:])], text, relation)
        self._others = unrelated

    @cached_property
    def _unrelated(self) -> UnrelatedText:
        return UnrelatedText(self.model, self.relation, self.text, self._others)

    def contexts(self, k: int, kind: str) -> tuple[Context, ...]:
        """One context for each set."""
        if k > len(self.shown):
            raise DataError(
                f"{k} shots: {self.relation.name} has {len(self.relation.facts)} facts, of which {len(self.shown)} are "
                f"set aside to be shown. Take at most {len(self.shown)}, or a relation with more facts."
            )
        return tuple(self._context(k, kind, place) for place in range(self.sets))

    def _context(self, k: int, kind: str, place: int) -> Context:
        if not k:
            return Context("")
        draw = random.Random(f"{self.seed}, set {place}")
        chosen = draw.sample(self.shown, len(self.shown))[:k]
        if kind == "shuffled":
            chosen = deranged(chosen, self.relation, draw)
        context = Context.of(chosen, self.text)
        if "{}" in context.text:
            raise DataError(f"A demonstration of {self.relation.name} holds {{}}, which marks the asked subject.")
        if kind != "unrelated":
            return context
        same = [fact for i, fact in enumerate(self.asked) if i % self.sets == place]
        return self._unrelated.like(context.text, same or self.asked[:1], f"{self.seed}, text {place}")

    def check_length(self, k: int, contexts: Sequence[Context]) -> None:
        """Refuse prompts that the model cannot read, answers included; DataError with counts."""
        sizes = []
        for i, fact in enumerate(self.asked):
            alone = encode_one(self.model, fact, self.text).prompt
            row = encode_one(self.model, fact, contexts[i % self.sets].text + self.text)
            sizes.append((len(row.prompt) + len(row.answer) - 1, len(row.prompt) - len(alone)))
        (longest, context), limit = max(sizes), self.model.network.n_ctx
        if longest > limit:
            raise DataError(
                f"{k} shots of {self.relation.name} make prompts of up to {longest} tokens, of which {context} are "
                f"demonstrations; {self.model.name} reads {limit}. Take fewer shots, or a shorter template."
            )

    def reference(self, k: int, zero: Prompts, rows: Sequence[int], partners: Sequence[int | None]) -> Prompts:
        """Questions after unrelated text, a text of its own for each, as long as that fact's k shots."""
        if not k:
            return zero.select(rows)
        shots, before = self.contexts(k, "shots"), [""] * len(zero)
        for i in rows:
            key = f"{self.seed}, reference {i}"
            before[i] = self._unrelated.like(shots[i % self.sets].text, [self.asked[i]], key).text
        return self.prompts(zero, rows, before, partners)

    def prompts(
        self, zero: Prompts, rows: Sequence[int], before: Sequence[str], partners: Sequence[int | None]
    ) -> Prompts:
        """The asked facts `rows`, each after its own text; foils and partners are those of no shot."""
        if not any(before):
            return zero.select(rows)
        made = [encode_one(self.model, self.asked[i], before[i] + self.text) for i in rows]
        swapped: list[list[int] | None] = []
        for i, row in zip(rows, made, strict=True):
            other = partners[i]
            prompt = [] if other is None else encode_one(self.model, self.asked[other], before[i] + self.text).prompt
            swapped.append(prompt if len(prompt) == len(row.prompt) else None)
        alone = zero.select(rows)
        objects = objects_after(self.model, before[rows[0]] + self.text, alone.facts, self.relation.objects)
        texts = [before[i] + text for i, text in zip(rows, alone.texts, strict=True)]
        foils = [None if fact.wrong else foil for fact, foil in zip(alone.facts, alone.foils.tolist(), strict=True)]
        return assemble(self.model, alone.facts, texts, made, objects, foils, swapped)
