"""An edit is wholly in or wholly out, wherever it is interrupted: by exceptions on any line, by Ctrl-C at any step."""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from kcwb.editing import change, interrupts
from kcwb.editing.edit import EditError, edit
from kcwb.progress import cancellable
from kcwb.tasks.relations import Fact
from tests.editing.conftest import FACT, QUICK, TEMPLATE, same_bits, weights

TUNING = {key: value for key, value in QUICK.items() if key != "prefixes"}
FILES = (change.__file__, interrupts.__file__)


class Stop(Exception):
    """Something that may come at any time."""


@pytest.fixture(scope="module")
def made(model):
    """A large edit, so that an inexact restoration would show."""
    return edit(model, FACT, "w50", "ft_m", layer=0, lr=0.3, clamp=0.7, **TUNING)


@pytest.fixture(scope="module")
def other(model):
    return edit(model, Fact("w7", "w41"), "w51", "rome", layer=0, **QUICK)


@pytest.fixture(autouse=True)
def _handler():
    """Every test leaves Ctrl-C as it was."""
    before = signal.getsignal(signal.SIGINT)
    yield
    found = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert found is before


def at_event(number: int, kinds: tuple[str, ...], strike: Callable[[], None], work: Callable[[], Any]) -> int:
    """Do some work and strike at the event of this number within the edit's code; how many events there were."""
    seen = 0

    def trace(frame: FrameType, kind: str, _argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in FILES or frame.f_code is interrupts._handle.__code__:
            return None
        frame.f_trace_opcodes = "opcode" in kinds
        # Python handles no signal on the step that leaves a function.
        leaving = kind == "opcode" and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")
        if kind in kinds and not leaving:
            seen += 1
            if seen == number:
                strike()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


def stop() -> None:
    raise Stop


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def each_time(kinds: tuple[str, ...], strike: Callable[[], None], work: Callable[[], Any]) -> list[bool]:
    """Work once for each event, striking at it; whether it was then interrupted."""
    interrupted: list[bool] = []
    while True:
        try:
            events = at_event(len(interrupted) + 1, kinds, strike, work)
        except (Stop, KeyboardInterrupt):
            interrupted.append(True)
        else:
            if events <= len(interrupted):
                return interrupted
            interrupted.append(False)
        yield_to_test()


yield_to_test: Callable[[], None] = lambda: None  # noqa: E731


@pytest.mark.parametrize(
    ("kinds", "strike"), [(("line",), stop), (("call", "line", "opcode"), ctrl_c)], ids=["exceptions", "signals"]
)
@pytest.mark.parametrize("way", ["with", "undo", "apply"])
def test_interrupted_anywhere_it_is_out_bit_for_bit(model, made, kinds, strike, way, monkeypatch):
    before, name, digest, logits = weights(model), model.name, model.digest, model.logits(torch.tensor([[1, 5, 6]]))
    checked = []

    def inside() -> None:
        assert made.active

    def work() -> None:
        if way == "with":
            with made:
                inside()
        elif way == "undo":
            made.undo()
        else:
            made.apply()

    def check() -> None:
        if way == "apply" and made.active:  # it was not interrupted, or not before it was in
            assert not same_bits(model, before) and model.digest != digest
            made.undo()
        assert not made.active and same_bits(model, before) and (model.name, model.digest) == (name, digest)
        if model.lock.mine:  # struck on the very step that lets go; in `with` no signal comes there
            assert strike is stop or way != "with"
            model.lock.release()
        checked.append(True)
        if way == "undo":
            made.apply()

    monkeypatch.setitem(globals(), "yield_to_test", check)
    if way == "undo":
        made.apply()
    interrupted = each_time(kinds, strike, work)
    made.undo()
    assert len(checked) == len(interrupted) > 12 and sum(interrupted) > 0.8 * len(interrupted)
    assert torch.equal(model.logits(torch.tensor([[1, 5, 6]])), logits)


def test_two_signals_at_any_time_leave_nothing_behind(model, made):
    """A real timer, many times while an edit goes in and out."""
    before, name, digest = weights(model), model.name, model.digest
    left, came = 0, 0

    def alarm(*_: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            ctrl_c()

    handler = signal.signal(signal.SIGALRM, alarm)
    try:
        for i in range(600):
            signal.setitimer(signal.ITIMER_REAL, 0)  # the last one's, which would strike before the try
            left = 2
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 100), 5e-5)
                    with made:
                        pass
                    while left:
                        pass
                except KeyboardInterrupt:
                    came += 1
                    while left:
                        pass
            except KeyboardInterrupt:
                came += 1
            assert not made.active and same_bits(model, before) and (model.name, model.digest) == (name, digest), i
            if model.lock.mine:  # the second signal came on the step that lets go after the first
                model.lock.release()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert came >= 600  # at least one of each two


def test_ctrl_c_during_the_work_comes_at_once_and_one_during_the_undoing_after_it(model, made):
    done = []
    with pytest.raises(KeyboardInterrupt), made:
        ctrl_c()
        done.append(True)
    assert not done and not made.active
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(int(made.active)))
    try:
        with made:
            ctrl_c()
        ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1, 0]  # a handler of the user's own is asked as before


def test_a_refused_undoing_does_not_hide_the_user_s_own_exception(model, made, other):
    before = weights(model)
    with pytest.raises(Stop) as caught, made:
        other.apply()
        raise Stop
    assert "put in after" in caught.value.__notes__[0]
    other.undo()
    made.undo()
    with pytest.raises(EditError, match="put in after"), made:
        other.apply()
    other.undo()
    made.undo()
    assert same_bits(model, before)


def test_edits_go_in_and_out_on_other_threads(model, made):
    before, found = weights(model), []

    def work() -> None:
        with made:
            found.append(same_bits(model, before))
        found.append(same_bits(model, before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]
    made.apply()
    thread = threading.Thread(target=made.undo)
    thread.start()
    thread.join()
    assert same_bits(model, before) and not made.active
    with made:  # the main thread's handler goes with the last edit
        pass


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft_m"])
def test_a_cancelled_search_leaves_the_model_alone_at_whatever_point(model, method):
    """Among them those at which the edited weights are measured."""
    before, digest, name = weights(model), model.digest, model.name
    more = QUICK if method != "ft_m" else TUNING
    counted, edited, limit = 0, 0, 0

    def check() -> None:
        nonlocal counted, edited
        counted += 1
        edited += model.digest != digest
        if counted == limit:
            raise Stop

    edit(model, FACT, "w50", method, layer=0, **more)  # texts and their covariance are in the cache now
    with cancellable(check):
        edit(model, FACT, "w50", method, layer=0, **more)
    assert edited >= 2
    for last in range(counted - edited, counted + 1):
        counted, limit = 0, last
        with pytest.raises(Stop), cancellable(check):
            edit(model, FACT, "w50", method, layer=0, **more)
        assert same_bits(model, before) and (model.name, model.digest) == (name, digest)
    assert TEMPLATE in QUICK["template"]
