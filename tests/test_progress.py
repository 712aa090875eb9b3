"""Long loops report between batches and stop where they are told to."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from kcwb.progress import cancel_point, cancellable, track


def loop(progress, total=3, n=1):
    """A loop of three batches of n."""
    done = []
    with track(progress, total, "working") as step:
        for i in range(3):
            done.append(i)
            step(n, f"batch {i}")
    return done


@pytest.mark.parametrize("n", [1, 4])
def test_a_callback_hears_what_is_done_of_how_much_and_a_note(n):
    calls = []
    loop(lambda *call: calls.append(call), total=3 * n, n=n)
    assert calls == [(n, 3 * n, "batch 0"), (2 * n, 3 * n, "batch 1"), (3 * n, 3 * n, "batch 2")]


def test_a_step_is_one_piece_without_a_note_unless_said():
    calls = []
    with track(lambda *call: calls.append(call), 2, "working") as step:
        step()
        step()
    assert calls == [(1, 2, ""), (2, 2, "")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("cancelled")])
def test_an_exception_of_the_callback_stops_the_loop(error):
    done = []

    def cancel(n, total, note):
        done.append(n)
        if n == 2:
            raise error

    with pytest.raises(BaseException) as caught:
        loop(cancel)
    assert caught.value is error or caught.type is error
    assert done == [1, 2]


def test_two_loops_count_apart():
    calls = []
    loop(lambda *call: calls.append(call))
    loop(lambda *call: calls.append(call))
    assert [call[0] for call in calls] == [1, 2, 3, 1, 2, 3]


def test_false_is_silent(capfd):
    assert loop(False) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_true_draws_a_bar_that_says_what_and_keeps_stdout_clean(capfd):
    assert loop(True) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert out == "" and "working" in err and "/3" in err


def test_an_exception_inside_the_loop_closes_the_bar(capfd):
    from tqdm.auto import tqdm

    with pytest.raises(RuntimeError, match="out of memory"), track(True, 3, "working") as step:
        step()
        raise RuntimeError("out of memory")
    assert not [bar for bar in tqdm._instances if bar.desc.startswith("working")]


def test_in_a_notebook_the_bar_is_a_line_of_text_that_goes(monkeypatch):
    import IPython

    shown: list[dict[str, str]] = []

    def display(bundle, *, raw, display_id):
        shown.append(bundle)
        return SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    monkeypatch.setattr("IPython.display.display", display)
    with pytest.raises(RuntimeError), track(True, 3, "working") as step:
        step(note="batch 0")
        raise RuntimeError
    assert "working" in shown[0]["text/plain"] and set(shown[0]) == {"text/plain"} and shown[-1] == {}


def test_a_check_is_called_while_it_is_in_force():
    calls = []
    cancel_point()
    with cancellable(lambda: calls.append("outer")):
        cancel_point()
        with cancellable(lambda: calls.append("inner")):
            cancel_point()
        cancel_point()
    cancel_point()
    assert calls == ["outer", "inner", "outer"]


def test_a_check_is_of_its_own_thread():
    def stop() -> None:
        raise RuntimeError("not for others")

    with cancellable(stop):
        other = threading.Thread(target=lambda: done.append(cancel_point()))
        done: list[None] = []
        other.start()
        other.join()
        with pytest.raises(RuntimeError, match="not for others"):
            cancel_point()
    assert done == [None]
