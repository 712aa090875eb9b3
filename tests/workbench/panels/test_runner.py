"""The runner: the latest request wins, a cancel stops at the next report or layer, and no error is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kcwb.progress import cancel_point
from kcwb.workbench.panels.runner import Runner

SOON = 5.0  # seconds, for what takes milliseconds


class Step:
    """A job that reports whenever the test lets it, until it is told to finish."""

    def __init__(self, result: Any = "result") -> None:
        self.started, self.go, self.result, self.reports = threading.Event(), threading.Semaphore(0), result, 0

    def __call__(self, progress: Callable[[int, int, str], None]) -> Any:
        self.started.set()
        for done in (1, 2, 3):
            assert self.go.acquire(timeout=SOON)
            progress(done, 3, f"step {done}")
            self.reports = done
        return self.result

    def release(self, times: int = 3) -> None:
        for _ in range(times):
            self.go.release()


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def runner(errors: list[BaseException]) -> Iterator[Runner]:
    runner = Runner(on_error=errors.append)
    yield runner
    runner.cancel()
    assert runner.wait(SOON)


def test_a_job_runs_and_its_result_arrives(runner):
    results, reports, step = [], [], Step()
    assert runner.state == "idle" and runner.job is None
    runner.submit("count", step, results.append, lambda *report: reports.append(report))
    assert step.started.wait(SOON)
    assert runner.state == "running" and runner.job == "count"
    assert not runner.wait(0.01)
    step.release()
    assert runner.wait(SOON)
    assert runner.state == "done" and runner.job is None and runner.error is None
    assert results == ["result"]
    assert reports == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


def test_waiting_without_work_returns_at_once(runner):
    assert runner.wait()


def test_jobs_run_on_one_thread_that_ends_with_the_work(runner):
    before, threads = threading.active_count(), []
    for _ in range(3):
        runner.submit("job", lambda progress: threads.append(threading.current_thread()))
        assert runner.wait(SOON)
    assert len(threads) == 3 and threading.main_thread() not in threads
    for thread in threads:
        thread.join(SOON)
    assert threading.active_count() <= before


def test_the_latest_request_wins(runner):
    results, first, dropped, last = [], Step("first"), Step("dropped"), Step("last")
    runner.submit("first", first, results.append)
    assert first.started.wait(SOON)
    runner.submit("dropped", dropped, results.append)
    runner.submit("last", last, results.append)
    assert runner.job == "last"
    first.release()
    last.release()
    assert runner.wait(SOON)
    assert results == ["last"] and not dropped.started.is_set()
    assert first.reports == 0  # it stopped at its first report


def test_the_result_of_a_superseded_job_is_not_delivered(runner):
    """Also when it finishes without another report."""
    results, started, go = [], threading.Event(), threading.Event()

    def deaf(progress):
        started.set()
        assert go.wait(SOON)
        return "late"

    runner.submit("deaf", deaf, results.append)
    assert started.wait(SOON)
    runner.submit("next", lambda progress: "next", results.append)
    go.set()
    assert runner.wait(SOON)
    assert results == ["next"]


def test_cancel_stops_at_the_next_report(runner, errors):
    results, step = [], Step()
    runner.submit("long", step, results.append)
    assert step.started.wait(SOON)
    step.release(1)
    runner.cancel()
    started = time.monotonic()
    step.release(1)
    assert runner.wait(SOON)
    assert time.monotonic() - started < 1
    assert runner.state == "idle" and step.reports <= 1
    assert not results and not errors and runner.error is None


def test_cancel_stops_between_reports_where_a_pass_can_be_cancelled(runner):
    started, results = threading.Event(), []

    def silent(progress):
        end = time.monotonic() + SOON
        while time.monotonic() < end:
            started.set()
            cancel_point()
        return "not cancelled"

    runner.submit("silent", silent, results.append)
    assert started.wait(SOON)
    runner.cancel()
    assert runner.wait(SOON / 2)
    assert runner.state == "idle" and not results


def test_a_cancelled_job_is_not_stopped_by_handlers_of_exceptions(runner):
    went_on, started, go = [], threading.Event(), threading.Event()

    def stubborn(progress):
        started.set()
        assert go.wait(SOON)
        try:
            progress(1, 2, "")
        except Exception:
            went_on.append("swallowed")

    runner.submit("stubborn", stubborn)
    assert started.wait(SOON)
    runner.cancel()
    go.set()
    assert runner.wait(SOON)
    assert not went_on


def test_cancel_without_work_changes_nothing(runner):
    runner.submit("job", lambda progress: None)
    assert runner.wait(SOON)
    runner.cancel()
    assert runner.state == "done"


def test_an_error_is_kept_and_told(runner, errors):
    def fail(progress):
        raise ValueError("no such thing")

    runner.submit("fail", fail)
    assert runner.wait(SOON)
    assert runner.state == "failed" and str(runner.error) == "no such thing"
    assert errors == [runner.error]
    runner.submit("again", lambda progress: None)
    assert runner.wait(SOON)
    assert runner.state == "done" and runner.error is None


def test_an_error_of_on_done_fails_the_request(runner, errors):
    runner.submit("job", lambda progress: 1, lambda result: [][result])
    assert runner.wait(SOON)
    assert runner.state == "failed" and isinstance(errors[0], IndexError)


def test_a_job_that_exits_does_not_end_the_runner(runner, errors):
    def leave(progress):
        raise SystemExit(3)

    runner.submit("leave", leave)
    assert runner.wait(SOON)
    assert runner.state == "failed" and isinstance(errors[0], SystemExit)


def test_exceptions_in_on_error_and_on_change_are_survived():
    def broken(*values):
        raise RuntimeError("broken callback")

    runner = Runner(on_change=broken, on_error=broken)
    results = []
    runner.submit("fail", lambda progress: [][0])
    assert runner.wait(SOON)
    assert isinstance(runner.error, IndexError)  # the job's own error comes first
    runner.submit("job", lambda progress: "fine", results.append)
    assert runner.wait(SOON)
    assert runner.state == "done" and results == ["fine"]
    assert str(runner.error) == "broken callback"


def test_on_done_may_submit_what_follows(runner):
    results = []

    def then(result):
        results.append(result)
        runner.submit("second", lambda progress: "second", results.append)

    runner.submit("first", lambda progress: "first", then)
    assert runner.wait(SOON)
    assert results == ["first", "second"]


def test_every_change_of_state_is_told():
    states: list[tuple[str, str | None]] = []
    runner = Runner(on_change=lambda: states.append((runner.state, runner.job)))
    runner.submit("job", lambda progress: None)
    assert runner.wait(SOON)
    assert states == [("running", "job"), ("done", None)]


def test_waiting_on_the_worker_itself_does_not_block_it(runner):
    answers = []
    runner.submit("job", lambda progress: answers.append(runner.wait()))
    assert runner.wait(SOON)
    assert answers == [False]


def test_many_threads_may_submit_and_cancel(runner, errors):
    """Whatever the order, the last request is the one that ends."""
    results = []

    def work(progress):
        for done in range(20):
            progress(done, 20, "")

    def hammer(seed):
        for i in range(50):
            runner.submit(f"{seed}.{i}", work, results.append)
            if i % 7 == seed:
                runner.cancel()

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    runner.submit("last", lambda progress: "last", results.append)
    assert runner.wait(SOON)
    assert results[-1] == "last" and not errors
