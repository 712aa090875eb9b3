"""Several runs at once: in order, on all cores, heard by a cancel, ended by an error."""

import threading
import time

import pytest
import torch

from kcwb.parallel import on_each_core
from kcwb.progress import cancel_point, cancellable

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order(two_threads: None) -> None:
    def late_first(i: int) -> tuple[int, int]:
        time.sleep(0.02 * (5 - i))
        return i, torch.get_num_threads()

    assert list(on_each_core(late_first, range(5), CPU)) == [(i, 1) for i in range(5)]
    assert torch.get_num_threads() == 2


def test_two_run_at_once(two_threads: None) -> None:
    both = threading.Barrier(2)
    assert list(on_each_core(lambda _: both.wait(timeout=20) >= 0, range(2), CPU)) == [True, True]


def test_one_core_or_another_device_runs_them_here(two_threads: None) -> None:
    here = threading.get_ident()
    assert set(on_each_core(lambda _: threading.get_ident(), range(3), torch.device("meta"))) == {here}
    torch.set_num_threads(1)
    assert set(on_each_core(lambda _: threading.get_ident(), range(3), CPU)) == {here}


def test_an_error_ends_the_rest(two_threads: None) -> None:
    begun = []

    def fail(i: int) -> None:
        begun.append(i)
        time.sleep(0.01)
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 0"):
        list(on_each_core(fail, range(100), CPU))
    assert len(begun) < 50
    assert torch.get_num_threads() == 2


def test_a_cancel_is_heard_in_every_thread(two_threads: None) -> None:
    class Stop(Exception):
        pass

    asked = threading.Event()

    def check() -> None:
        if asked.is_set():
            raise Stop

    def work(i: int) -> None:
        asked.set()
        cancel_point()

    with cancellable(check), pytest.raises(Stop):
        list(on_each_core(work, range(4), CPU))
