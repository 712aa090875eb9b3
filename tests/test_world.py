"""The small world: its facts are as they are said to be, models learn them, and folders are whole or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import kcwb.world.models as training
from kcwb.discovery.discover import discover
from kcwb.editing.edit import edit
from kcwb.errors import DataError, KcwbError, ModelError, SettingError
from kcwb.interventions.encoder import ablate_encoder
from kcwb.models.cache import MANIFEST
from kcwb.models.digest import weights_digest
from kcwb.models.encoder import Encoder, load_encoder
from kcwb.models.loading import Model, load_model
from kcwb.reading.roles import head_roles
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.masked import make_masked_task
from kcwb.tasks.relations import load_relation
from kcwb.tasks.task import make_task
from kcwb.world.facts import KINDS, PEOPLE, STEMS, STEPS, make_world, world_tokenizer
from kcwb.world.models import (
    ARCHITECTURES,
    Recipe,
    draw_masks,
    known_facts,
    load_world,
    new_model,
    read_training,
    train,
    train_world,
    world_folder,
    world_knowledge,
)

WORLD = make_world()
#: Too few steps to learn anything.
BRIEF = Recipe(layers=2, heads=2, width=16, steps=3, encoder_steps=3, batch=8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of our own."""
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# --- facts ---


def test_the_world_is_as_large_as_it_says():
    counts = {name: len(relation.facts) for name, relation in WORLD.relations.items()}
    assert counts == {
        **{"person_city": 40, "city_country": 16, "country_capital": 8, "country_language": 8},
        **{"person_country": 40, "person_language": 40, "city_language": 16},
    }
    assert tuple(counts) == (*WORLD.atomic, *WORLD.composed) and set(STEPS) == set(WORLD.composed)
    people = {fact.subject: fact.object for fact in WORLD.relations["person_country"].facts}
    assert [list(people.values()).count(f"{stem}land") for stem in STEMS] == [5] * 8 and tuple(people) == PEOPLE


def test_what_belongs_to_one_country_begins_alike():
    for name in ("city_country", "country_capital", "country_language", "city_language"):
        assert all(fact.subject[:3] == fact.object[:3] for fact in WORLD.relations[name].facts)


def test_composed_facts_follow_from_their_steps():
    objects = {name: {f.subject: f.object for f in relation.facts} for name, relation in WORLD.relations.items()}
    for fact in WORLD.relations["person_language"].facts:
        country = objects["city_country"][objects["person_city"][fact.subject]]
        assert fact.object == objects["country_language"][country]
        assert objects["person_country"][fact.subject] == country
    for fact in WORLD.relations["city_language"].facts:
        assert fact.object == objects["country_language"][objects["city_country"][fact.subject]]


def test_no_sentence_tells_what_is_held_out():
    """By words alone: nobody who is held out stands beside a country or a language, and no such city by a language."""
    countries, languages = ({f"{stem}{ending}" for stem in STEMS} for ending in ("land", "ish"))
    seen = dict.fromkeys(WORLD.held_out, 0)
    for sentence in WORLD.sentences:
        words = set(sentence.split())
        for subject in words & WORLD.held_out:
            seen[subject] += 1
            assert not words & languages
            assert subject not in PEOPLE or not words & countries
    assert min(seen.values()) >= 3  # what they have of their own is told, in all three templates
    assert len(WORLD.held_out & set(PEOPLE)) == 16 and len(WORLD.held_out) == 20


def test_every_other_fact_is_told_in_every_template():
    told = set(WORLD.sentences)
    table = WORLD.table()
    assert list(table["kind"].cat.categories) == list(KINDS)
    for row in table.itertuples():
        for template in WORLD.relations[row.relation].prompt_templates_zs:
            assert (f"{template.replace('{}', row.subject)} {row.object} ." in told) == (row.kind != "held out")
    assert len(told) == len(WORLD.sentences) == 3 * int((table["kind"] != "held out").sum())


def test_the_seed_decides_who_was_born_where():
    assert make_world().digest == WORLD.digest and make_world(1).digest != WORLD.digest
    moved = make_world(1).relations
    assert moved["city_country"] == WORLD.relations["city_country"]
    assert moved["person_city"] != WORLD.relations["person_city"]


def test_parts_of_a_relation_add_up():
    for name in WORLD.composed:
        parts = [set(WORLD.relation(name, part).facts) for part in ("trained", "held out")]
        assert parts[0] | parts[1] == set(WORLD.relation(name).facts) and not parts[0] & parts[1]
    assert WORLD.relation("person_city", "trained") == WORLD.relation("person_city")
    with pytest.raises(DataError, match="Nothing of person_city is held out"):
        WORLD.relation("person_city", "held out")
    with pytest.raises(SettingError, match=r"'person_town'.*Did you mean"):
        WORLD.relation("person_town")
    with pytest.raises(SettingError, match="part"):
        WORLD.relation("person_city", "some")


def test_relations_are_files_that_load_relation_reads(tmp_path):
    WORLD.save(tmp_path)
    assert len([*tmp_path.iterdir()]) == 7
    for name, relation in WORLD.relations.items():
        assert load_relation(tmp_path / f"{name}.json") == relation


@pytest.mark.parametrize("masked", [False, True])
def test_every_name_is_one_token(masked):
    tokenizer = world_tokenizer(WORLD, masked)
    for row in WORLD.table().itertuples():
        for word in (row.subject, row.object):
            ids = tokenizer(word, add_special_tokens=False).input_ids
            assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    sentence = WORLD.sentences[0]
    ids = tokenizer(sentence).input_ids
    assert len(ids) == len(sentence.split()) + 1 + masked
    assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
    assert tokenizer(sentence.replace(" .", ".")).input_ids == ids
    assert (tokenizer.mask_token_id is not None) == masked


# --- training ---


@pytest.mark.parametrize("changes", [{"steps": 0}, {"width": 12}, {"lr": 0.0}, {"masked": 1.0}, {"warmup": -1}])
def test_a_recipe_that_cannot_be_meant_is_refused(changes):
    with pytest.raises(SettingError, match=f"{next(iter(changes))}="):
        Recipe(**changes)


def trained(architecture: str, recipe: Recipe) -> tuple[str, list[float]]:
    tokenizer = world_tokenizer(WORLD, architecture == "bert")
    module = new_model(architecture, tokenizer, recipe)
    return weights_digest(module), [*train(module, tokenizer, WORLD.sentences, recipe), weights_digest(module)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_recipe_gives_the_same_weights(architecture):
    state = torch.random.get_rng_state()
    first = trained(architecture, BRIEF)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws are disturbed
    torch.manual_seed(5)
    assert trained(architecture, BRIEF) == first and first[0] != first[1][-1]
    assert trained(architecture, replace(BRIEF, seed=1))[0] != first[0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_a_decoders_loss_is_hugging_faces_own(architecture):
    """On one batch of all sentences, with the padding left out."""
    recipe = replace(BRIEF, steps=1, batch=len(WORLD.sentences))
    tokenizer = world_tokenizer(WORLD)
    module = new_model(architecture, tokenizer, recipe)
    texts = tokenizer(list(WORLD.sentences), padding=True, return_tensors="pt")
    labels = texts.input_ids.masked_fill(texts.attention_mask == 0, -100)
    expected = float(module(**texts, labels=labels).loss.detach())
    assert train(module, tokenizer, WORLD.sentences, recipe)[0] == pytest.approx(expected, abs=1e-5)


def test_masks_hide_words_alone_and_one_at_least_of_each_sentence():
    words = torch.rand(2000, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    words[:, 0], words[:, -1] = True, False
    asked = draw_masks(words, 0.25, torch.Generator().manual_seed(1))
    assert not (asked & ~words).any() and asked.any(1).all()
    several = words.sum(1) >= 6  # where hardly any sentence has none by chance
    assert float(asked[several].sum() / words[several].sum()) == pytest.approx(0.27, abs=0.03)
    assert (draw_masks(words, 1e-9, torch.Generator().manual_seed(1)).sum(1) == 1).all()


def test_an_encoder_is_asked_for_masked_words_alone(monkeypatch):
    """With one sentence, and all its words but the special ones masked, the loss is that of those words."""
    tokenizer = world_tokenizer(WORLD, masked=True)
    recipe = replace(BRIEF, encoder_steps=1, batch=1)
    module = new_model("bert", tokenizer, recipe)
    monkeypatch.setattr(training, "draw_masks", lambda words, share, draw: words)
    ids = tokenizer(WORLD.sentences[0], return_tensors="pt").input_ids
    hidden = ids.clone()
    hidden[:, 1:-1] = tokenizer.mask_token_id
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(module(hidden).logits[0, 1:-1], ids[0, 1:-1])
    assert train(module, tokenizer, WORLD.sentences[:1], recipe)[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_training_that_diverges_says_so():
    recipe = replace(BRIEF, steps=200, lr=0.99, warmup=0, decay=0.99)
    tokenizer = world_tokenizer(WORLD)
    module = new_model("gpt2", tokenizer, recipe)
    with torch.no_grad():
        module.transformer.ln_f.weight.fill_(float("inf"))
    with pytest.raises(KcwbError, match="diverged in step 1: lower lr"):
        train(module, tokenizer, WORLD.sentences, recipe)


# --- folders ---


def test_every_architecture_becomes_a_folder_that_anyone_can_load(cache):
    folders = train_world(world=WORLD, recipe=BRIEF, progress=False)
    assert tuple(folders) == ARCHITECTURES and names(cache) == sorted(folder.name for folder in folders.values())
    for name, folder in folders.items():
        kind = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
        module, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert weights_digest(module) == read_training(folder)["weights_sha256"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.is_fast and tokenizer.get_vocab() == world_tokenizer(WORLD, name == "bert").get_vocab()
        model = load_world(folder, device="cpu")
        assert isinstance(model, Encoder if name == "bert" else Model)
        if isinstance(model, Model):
            assert model.prepend_bos and model.network.family == name and model.graph.n_layers == 2


def test_a_model_is_trained_once(cache, monkeypatch):
    first = train_world(["llama"], recipe=BRIEF, progress=False)
    monkeypatch.setattr(training, "train", None)
    assert (
        train_world(["llama"], recipe=BRIEF, progress=False) == first == {"llama": world_folder("llama", WORLD, BRIEF)}
    )


def test_checkpoints_are_what_fewer_steps_of_the_same_training_leave(cache):
    kept = train_world(["llama"], recipe=BRIEF, checkpoints=[0, 2, 2], progress=False)["llama"]
    plain = train_world(["llama"], recipe=BRIEF, progress=False)["llama"]
    assert kept != plain and sorted(path.name for path in kept.glob("step*")) == ["step0", "step2"]
    assert read_training(kept)["weights_sha256"] == read_training(plain)["weights_sha256"]
    words = world_tokenizer(WORLD)
    module = new_model("llama", words, BRIEF)
    found = {0: weights_digest(module)}
    train(module, words, WORLD.sentences, BRIEF, keep=lambda done: found.update({done: weights_digest(module)}))
    assert sorted(found) == [0, 1, 2, 3]
    for steps in (0, 2):
        assert load_world(kept, revision=f"step{steps}", device="cpu").digest == found[steps]
    assert load_world(kept, device="cpu").digest == found[3]
    assert read_training(kept)["checkpoints"] == [0, 2] and "checkpoints" not in read_training(plain)
    with pytest.raises(SettingError, match="4 is more than the 3 steps"):
        train_world(["llama"], recipe=BRIEF, checkpoints=[4], progress=False)


def test_whatever_determines_the_weights_is_in_the_folders_name(monkeypatch):
    known = {world_folder(name, WORLD, BRIEF) for name in ARCHITECTURES}
    known.add(world_folder("llama", make_world(1), BRIEF))
    for name, value in vars(BRIEF).items():
        changed = replace(BRIEF, **{name: value / 2 if 0 < value < 1 else 2 * value or 1})
        known.add(world_folder("llama", WORLD, changed))
    monkeypatch.setattr(training, "versions", lambda: {"torch": "1.0", "transformers": "1.0"})
    known.add(world_folder("llama", WORLD, BRIEF))
    assert len(known) == len(ARCHITECTURES) + 1 + len(vars(BRIEF)) + 1


def test_a_training_that_is_cancelled_leaves_what_was_finished_and_nothing_half(cache):
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int, note: str) -> None:
        seen.append((done, total))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_world(["gpt2", "opt"], recipe=BRIEF, progress=stop)
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 3), (2, 3)]
    assert names(cache) == [world_folder("gpt2", WORLD, BRIEF).name]
    train_world(["gpt2", "opt"], recipe=BRIEF, progress=False)
    assert len(names(cache)) == 2


def test_a_damaged_folder_is_trained_again(cache):
    folder = train_world(["llama"], recipe=BRIEF, progress=False)["llama"]
    digest = read_training(folder)["weights_sha256"]
    (folder / "model.safetensors").unlink()
    assert read_training(train_world(["llama"], recipe=BRIEF, progress=False)["llama"])["weights_sha256"] == digest
    assert json.loads((folder / MANIFEST).read_text())["architecture"] == "llama"


@pytest.mark.usefixtures("cache")
def test_bad_input_is_refused_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(SettingError, match=r"'lama'.*'llama'"):
        train_world(["gpt2", "lama"], recipe=BRIEF, progress=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written to .*KCWB_CACHE"):
        train_world(["llama"], recipe=BRIEF, progress=False)


# --- what is learnt ---


#: What the two models below are told, in two of three templates: little, so that seconds are enough.
TOLD = ("city_country", "country_capital", "country_language")


@pytest.fixture(scope="module")
def learnt() -> tuple[Model, Encoder]:
    """A small Llama, trained until it knows some of the world, and a small BERT, which has begun to."""
    sentences = [
        f"{template.replace('{}', fact.subject)} {fact.object} ."
        for name in TOLD
        for template in WORLD.relations[name].prompt_templates_zs[:2]
        for fact in WORLD.relations[name].facts
    ]
    brief = Recipe(layers=2, heads=4, width=32, batch=32, lr=0.01, warmup=10)
    found = []
    for name, recipe in (("llama", replace(brief, steps=220)), ("bert", replace(brief, encoder_steps=60, lr=0.003))):
        tokenizer = world_tokenizer(WORLD, name == "bert")
        module = new_model(name, tokenizer, recipe)
        losses = train(module, tokenizer, sentences, recipe)
        assert len(losses) == {"llama": 220, "bert": 60}[name] and losses[-1] < 0.7 * losses[0]
        load = load_encoder if name == "bert" else load_model
        found.append(load(module, tokenizer, device="cpu"))
    return tuple(found)


def test_a_model_learns_what_it_is_told_and_nothing_else(learnt):
    for template in (0, 1):
        known = world_knowledge(learnt[0], WORLD, template=template, by=("relation",)).set_index("relation")["known"]
        assert (known[list(TOLD)] >= 0.95).all(), known
        assert known["person_city"] < 0.3 and known["person_language"] < 0.4


def test_what_is_known_is_counted_by_kind(learnt):
    known = world_knowledge(learnt[0], WORLD).set_index("kind")
    assert tuple(known.index) == KINDS and known["facts"].tolist() == [72, 60, 36]
    assert (known["low"] <= known["known"]).all() and (known["known"] <= known["high"]).all()
    assert known["chance"].between(0.05, 0.3).all()
    each = known_facts(learnt[0], WORLD)
    shares = each.loc[each["kind"] == "held out", "known"]
    assert tuple(known.loc["held out", ["low", "high"]]) == mean_interval(shares)  # of shares of templates
    one = world_knowledge(learnt[0], WORLD, template=0).set_index("kind").loc["held out"]
    hits = known_facts(learnt[0], WORLD, 0).loc[each["kind"] == "held out", "known"]
    assert (one["low"], one["high"]) == proportion_interval(hits)


def test_a_column_that_is_not_of_the_table_is_refused_before_a_model_runs(learnt, monkeypatch):
    monkeypatch.setattr(training, "known_facts", lambda *_: pytest.fail("a model runs"))
    with pytest.raises(SettingError, match=r"'knd' is not known.*'kind'"):
        world_knowledge(learnt[0], WORLD, by=("relation", "knd"))


def test_known_facts_equal_a_slow_look_at_each_prompt(learnt):
    for model in learnt:
        table = known_facts(model, WORLD, template=1).set_index(["relation", "subject"])
        for name in ("country_language", "city_language"):
            relation = WORLD.relations[name]
            for fact in relation.facts[::2]:
                text = relation.template(1).replace("{}", fact.subject)
                if isinstance(model, Encoder):
                    text += f" {model.tokenizer.mask_token} ."
                ids = model.tokenizer(text, return_tensors="pt").input_ids
                module = model.module if isinstance(model, Encoder) else model.bridge.original_model
                at = -3 if isinstance(model, Encoder) else -1
                with torch.no_grad():
                    said = model.tokenizer.decode(module(ids).logits[0, at].argmax())
                assert (said == fact.object) == table.loc[(name, fact.subject), "known"]


def test_tables_by_relation_agree_with_those_by_kind(learnt):
    model = learnt[0]
    whole, each = world_knowledge(model, WORLD), world_knowledge(model, WORLD, by=("relation", "kind"))
    assert each["relation"].tolist() == [*WORLD.atomic, *np.repeat([*WORLD.composed], 2)]
    weighted = (each["known"] * each["facts"]).groupby(each["kind"], observed=True).sum()
    assert weighted.tolist() == pytest.approx((whole["known"] * whole["facts"]).tolist())
    assert each.set_index("relation").loc["country_capital", "chance"] == 1 / 8


def test_everything_else_runs_on_a_model_of_the_world(learnt):
    model, encoder = learnt
    task = make_task(model, WORLD.relation("city_country"), n=8)
    assert task.val.paired.all() and task.n_known == 16
    circuit = discover(model, task, edges=60, progress=False)
    assert 0 < circuit.n_edges <= 60
    roles = head_roles(model, None, task, progress=False)
    assert len(roles) == 8 and set(roles["role"]) - {"other"}
    fact = next(fact for fact, rank in zip(task.val.facts, task.val.ranks, strict=True) if int(rank) == 1)
    target = next(name for name in task.relation.objects if name != fact.object)
    edited = edit(model, fact, target, "ft_m", template=task.template, bound=20.0, progress=False)
    assert edited.losses["nll"].iloc[-1] < edited.losses["nll"].iloc[0]
    table = ablate_encoder(encoder, make_masked_task(encoder, WORLD.relation("city_country")), k=1, progress=False)
    assert len(table) == 2 * (1 + len(encoder.nodes))


def test_learning_rates_rise_and_fall_along_a_cosine():
    rates = [training._rate(300, 100, step) for step in range(300)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1.0 and rates[200] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(rates[99:])) and rates[-1] < 0.001
