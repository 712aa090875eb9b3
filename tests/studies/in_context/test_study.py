"""Planted heads are found as new and needed, and others are not; what cannot be meant is refused before any work."""

from __future__ import annotations

import pandas as pd
import pytest

from kcwb.errors import DataError, SettingError
from kcwb.studies.in_context.ablation import ablate_new
from kcwb.studies.in_context.accuracy import shot_accuracy
from kcwb.studies.in_context.study import in_context
from tests.studies.in_context.conftest import DECOYS, FORMAT, study


def test_shots_make_the_planted_model_answer_and_unrelated_text_does_not(found):
    hits = found.accuracy.set_index(["k", "kind"])["hit_1"]
    assert hits[0, "shots"] == 0 and hits[3, "unrelated"] == 0
    assert hits[3, "shots"] == 1 and hits[3, "shuffled"] == 1  # it learns which kind is asked for, not who has what


def test_the_planted_heads_are_new_and_the_mover_is_shared(found):
    assert found.named("new") == FORMAT and "a0.h1" in found.named("shared")
    assert not set(DECOYS) & set(found.named("new"))


def test_without_the_planted_heads_the_shots_are_lost_and_without_random_ones_not(found):
    table = found.ablation.set_index("arm")
    assert table.loc["intact", "hit_1"] == 1 and table.loc["new heads", "hit_1"] == 0
    assert table.loc["random heads", "hit_1"] > 0.95 and table.loc["shared heads", "hit_1"] < 0.5
    assert table.loc["new heads", "p_hit_1"] == pytest.approx(1 / 50)  # 7 x 7 sets are possible
    assert table.drop("new heads")["p_hit_1"].isna().all()


def test_a_head_that_does_not_matter_is_told_apart(planted, found):
    model, _, _ = planted
    table = ablate_new(model, found.tasks[3, "shots"], DECOYS, progress=False).set_index("arm")
    assert table["hit_1"]["new heads"] == 1 and table["p_hit_1"].to_dict()["new heads"] > 0.5


def test_the_planted_heads_read_the_demonstrated_objects(found):
    row = found.reading.set_index("quantity").T.to_dict()["object"]
    assert row["new heads"] > 0.9 > 0.5 > row["random heads"]
    assert row["p"] <= 0.2  # the decoys read them, too, and are drawn
    shares = found.heads.set_index("node")["object_share"].to_dict()
    assert min(shares[head] for head in FORMAT) > 0.9


def test_where_nothing_is_new_it_says_so(planted):
    """Three sentences about something else bring nothing, and there is nothing to ablate."""
    none = study(planted, kind="unrelated", edges=6, draws=5)
    assert none.named("new") == [] and none.named("shared") == ["a0.h1"]
    assert none.ablation["arm"].tolist() == ["intact", "shared heads"] and none.reading.empty


def test_it_can_be_cancelled_in_every_part(planted):
    model, relation, others = planted
    seen = []

    class Cancelled(Exception):
        pass

    def stop_at(part: str):
        def progress(done: int, total: int, note: str) -> None:
            seen.append(note)
            if note.startswith(part):
                raise Cancelled

        return progress

    for part in ("questions", "circuits", "ablation"):
        with pytest.raises(Cancelled):
            in_context(
                model,
                relation,
                2,
                edges=10,
                n=4,
                n_test=4,
                unrelated=others,
                resamples=5,
                draws=5,
                progress=stop_at(part),
            )
    assert {note.split(",")[0] for note in seen} == {"questions", "circuits", "ablation"}


def test_results_repeat(planted, found):
    again = study(planted)
    for name in ("nodes", "ablation", "heads", "reading"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"edges": 0}, {"edges": 10**6}, {"draws": 0}, {"resamples": 0}, {"steps": 0}], ids=str
)
def test_settings_that_cannot_be_meant_are_refused_before_any_work(planted, monkeypatch, wrong):
    monkeypatch.setattr("kcwb.studies.in_context.study.shot_tasks", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(SettingError):
        in_context(planted[0], planted[1], **{"k": 2, "progress": False, **wrong})


def test_facts_to_ask_are_needed_before_circuits_are_looked_for(planted, monkeypatch):
    monkeypatch.setattr("kcwb.studies.in_context.study.context_circuits", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(DataError, match="n_test >= 1"):
        study(planted, n_test=0)


def test_accuracy_is_the_share_of_first_choices(made):
    _, task = made("llama")
    ranks = task.test.ranks.numpy()
    row = shot_accuracy([task]).iloc[0]
    assert (row["hit_1"], row["hit_10"]) == ((ranks == 1).mean(), (ranks <= 10).mean())
    assert row["low"] - 1e-9 <= row["hit_1"] <= row["high"] + 1e-9 and (row["k"], row["facts"]) == (2, 6)
