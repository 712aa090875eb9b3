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

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kcwb.errors import DataError, SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed
from kcwb.tasks.prompts import (
    KNOWN_RANK,
    Prompts,
    Task,
    encode,
    encode_one,
    full_ranks,
    object_tokens,
    padded,
    split,
    told_apart,
)
from kcwb.tasks.ranks import deciding_tokens
from kcwb.tasks.relations import Fact, Relation, check_template, load_relation, load_relations
from kcwb.verbs import verb

KINDS = ("shots", "shuffled", "unrelated")
#: What a token before END can belong to, see `ShotTask.groups`.
GROUPS = ("object", "subject", "separator", "words", "first", "question")
_SHOWN = 16  # facts that are set aside to be shown, at most a third of the relation's
_REFERENCE_SIZE = 16
_TRIES = 200
_SEPARATOR = "\n"


def label_of(k: int, kind: str) -> str:
    """A name for a context, as in `ShotTask.label`."""
    return "1 shot" if (k, kind) == (1, "shots") else f"{k} {kind}"


@dataclass(frozen=True)
class Context:
    """What stands before a question.

    Attributes
    ----------
    text
        Lines, each with its line break; empty for no shot.
    shown
        The demonstrations as they are written, with each other's objects where they are shuffled; none for unrelated
        text.
    spans
        (group, start, stop) in characters: where objects, subjects and separators stand.
    """

    text: str
    shown: tuple[Fact, ...] = ()
    spans: tuple[tuple[str, int, int], ...] = ()


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
                group = _group(context, start, stop)
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
        If more facts are to be shown than can be set aside, a prompt does not fit into the context (both before
        anything is computed), the model knows none of the facts, or no unrelated text of the length can be made.
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
    relation = load_relation(relation) if isinstance(relation, str) else relation
    for _, kind in wanted:
        choose("The kind of context", kind, KINDS)
    text = _template(relation, template)
    deal = _Deal(model, relation, text, seed, sets, unrelated)
    for k, kind in dict.fromkeys(wanted):
        deal.check_length(k, deal.contexts(k, "shots" if kind == "unrelated" else kind))
    contexts = {(k, kind): deal.contexts(k, kind) for k, kind in dict.fromkeys(wanted)}

    zero = encode(model, deal.asked, text, relation.objects, seed, progress=progress)
    known = [i for i, hit in enumerate(zero.known.tolist()) if hit]
    if not known:
        raise DataError(
            f"{model.name} knows none of the {len(zero)} facts of {relation.name} that are asked in {text!r:.120} "
            f"(Hit@{KNOWN_RANK}, no shot); the best rank is {int(zero.ranks.min())}. Try another template or relation."
        )
    rows = split(known, len(zero), n, seed, n_test)
    partners = _partners(zero, seed)
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
        self._unrelated, self._sentences = unrelated, None

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
            chosen = _deranged(chosen, self.relation, draw)
        context = _written(chosen, self.text)
        if "{}" in context.text:
            raise DataError(f"A demonstration of {self.relation.name} holds {{}}, which marks the asked subject.")
        if kind != "unrelated":
            return context
        same = [fact for i, fact in enumerate(self.asked) if i % self.sets == place]
        return self._other_text(context.text, same or self.asked[:1], f"{self.seed}, text {place}")

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
            before[i] = self._other_text(shots[i % self.sets].text, [self.asked[i]], key).text
        return self.prompts(zero, rows, before, partners)

    def prompts(
        self, zero: Prompts, rows: Sequence[int], before: Sequence[str], partners: Sequence[int | None]
    ) -> Prompts:
        """The asked facts `rows`, each after its own text; foils and partners are those of no shot."""
        if not any(before):
            return zero.select(rows)
        made = {i: encode_one(self.model, self.asked[i], before[i] + self.text) for i in rows}
        corrupted, paired = [], []
        for i in rows:
            other, prompt = partners[i], made[i].prompt
            if other is not None:
                swapped = encode_one(self.model, self.asked[other], before[i] + self.text).prompt
                other, prompt = (other, swapped) if len(swapped) == len(prompt) else (None, prompt)
            paired.append(other is not None)
            corrupted.append(prompt + made[i].answer[:-1])
        some, device = [made[i] for i in rows], self.model.device
        names, answers = [self.asked[i].object for i in rows], [row.answer for row in some]
        tokens = object_tokens(
            self.model, before[rows[0]] + self.text, self.asked[rows[0]].subject, self.relation.objects
        )
        alone = zero.select(rows)
        prompts = replace(
            alone,
            texts=tuple(context + text for context, text in zip((before[i] for i in rows), alone.texts, strict=True)),
            tokens=padded([row.prompt + row.answer[:-1] for row in some], device),
            lengths=torch.tensor([len(row.prompt) for row in some], device=device),
            subject_start=torch.tensor([row.start for row in some], device=device),
            subject_stop=torch.tensor([row.stop for row in some], device=device),
            answers=padded(answers, device),
            answer_mask=padded([[1] * len(answer) for answer in answers], device).bool(),
            decides=torch.tensor(deciding_tokens(names, answers, tokens), device=device),
            corrupted=padded(corrupted, device),
            paired=torch.tensor(paired, device=device),
        )
        return replace(prompts, ranks=full_ranks(self.model, prompts, False))

    # --- unrelated text ---

    def _other_text(self, like: str, facts: Sequence[Fact], key: str) -> Context:
        """Sentences of other relations that take exactly as many tokens before the facts' questions as `like` does.

        Sentences are put together until they are long enough; then words are taken away at the front.
        """
        by_relation = self._other_sentences()
        draw = random.Random(key)
        wanted = [self._count(like, fact) for fact in facts]
        for _ in range(_TRIES):
            text = ""
            for sentences in itertools.cycle(draw.sample(by_relation, len(by_relation))):
                text = draw.choice(sentences) + _SEPARATOR + text
                if self._count(text, facts[0]) >= wanted[0]:
                    break
            first_line = text.index(_SEPARATOR)
            for start in (0, *(match.end() for match in re.finditer(" +", text[:first_line]))):
                cut = text[start:]
                if all(self._count(cut, fact) == n for fact, n in zip(facts, wanted, strict=True)):
                    return Context(cut, (), _separators(cut))
        raise DataError(
            f"No text of exactly {wanted[0]} tokens, the question included, could be made of the sentences of "
            f"{len(by_relation)} other relations in {_TRIES} tries. Give others: unrelated=[...]."
        )

    def _count(self, context: str, fact: Fact) -> int:
        return len(encode_one(self.model, fact, context + self.text).prompt)

    def _other_sentences(self) -> list[list[str]]:
        """The sentences of each other relation that name no subject and no object of this one."""
        if self._sentences is None:
            others = load_relations() if self._unrelated is None else self._unrelated
            names = {name for fact in self.relation.facts for name in (fact.subject, fact.object)}
            named = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)
            found = []
            for other in others:
                if other.name != self.relation.name:
                    lines = [_line(fact, other.prompt_templates[0]) for fact in other.facts]
                    found.append([line for line in lines if not named.search(line) and "{}" not in line])
            self._sentences = [lines for lines in found if lines]
            if not self._sentences:
                raise DataError(
                    f"Each sentence of the {len(others)} relations that unrelated text could be made of names "
                    f"something of {self.relation.name}. Give others: unrelated=[...]."
                )
        return self._sentences


# --- text ---


def _template(relation: Relation, which: int | str) -> str:
    if isinstance(which, str):
        return check_template(which, "template")
    known = relation.prompt_templates
    if not 0 <= which < len(known):
        raise SettingError(
            f"template={which}: {relation.name} has {len(known)} several-shot templates, 0 to {len(known) - 1}."
        )
    return known[which]


def _line(fact: Fact, template: str) -> str:
    return f"{template.replace('{}', fact.subject)} {fact.object}"


def _written(facts: Sequence[Fact], template: str) -> Context:
    """Demonstrations, one a line, and where their parts stand."""
    text, spans = "", []
    for fact in facts:
        start = len(text) + template.index("{}")
        line = _line(fact, template)
        stop = len(text) + len(line)
        spans += [
            ("subject", start, start + len(fact.subject)),
            ("object", stop - len(fact.object), stop),
            ("separator", stop, stop + len(_SEPARATOR)),
        ]
        text += line + _SEPARATOR
    return Context(text, tuple(facts), tuple(spans))


def _separators(text: str) -> tuple[tuple[str, int, int], ...]:
    return tuple(("separator", match.start(), match.end()) for match in re.finditer(_SEPARATOR, text))


def _group(context: Context, start: int, stop: int) -> str:
    """What a token belongs to that covers these characters; one that touches two belongs to the first in `GROUPS`."""
    if start >= len(context.text):
        return "question"
    touched = {group for group, a, b in context.spans if start < b and stop > a}
    return next((group for group in GROUPS if group in touched), "words")


def _deranged(facts: Sequence[Fact], relation: Relation, draw: random.Random) -> list[Fact]:
    """The same subjects with one another's objects, none with its own.

    Where that cannot be (a single fact, or most have the same object), what is left over gets another object of the
    relation.
    """
    cost = [[draw.random() + len(facts) * (a.object == b.object) for b in facts] for a in facts]
    given = [facts[j].object for j in linear_sum_assignment(cost)[1]]
    wrong = []
    for fact, name in zip(facts, given, strict=True):
        others = [other for other in relation.objects if other != fact.object]
        if not others:
            raise DataError(
                f"All {len(relation.facts)} facts of {relation.name} have the object {fact.object!r:.60}: its labels "
                "cannot be shuffled."
            )
        wrong.append(Fact(fact.subject, draw.choice(others) if name == fact.object else name))
    return wrong


def _partners(zero: Prompts, seed: int) -> list[int | None]:
    """For each prompt another one with as many tokens whose answer starts otherwise, or None."""
    draw, found = random.Random(seed), []
    lengths, first = zero.lengths.tolist(), zero.answers[:, 0].tolist()
    for i in range(len(zero)):
        others = [j for j in range(len(zero)) if lengths[j] == lengths[i] and first[j] != first[i]]
        found.append(draw.choice(others) if others else None)
    return found
