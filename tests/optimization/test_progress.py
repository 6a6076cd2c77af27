import io
import os
import pty
import sys

import pytest
from analytic import SMALL_SPACE, SmallObjective, rich_evaluation

from var_moe.optimization.methods import random_search
from var_moe.optimization.results import Evaluation
from var_moe.optimization.study import SearchProgress
from var_moe.terminal import duration


def lines_of(evaluations, *, total=50, finished=(), **more):
    stream = io.StringIO()
    finished = list(finished)
    with SearchProgress(total=total, finished=finished, stream=stream, **more) as progress:
        for number, evaluation in enumerate(evaluations, start=len(finished) + 1):
            progress.update(evaluation, number)
    return stream.getvalue().splitlines()


def timed(seconds, **more):
    return Evaluation(params={}, score=1.0, seconds=seconds, **more)


def test_a_line_per_evaluation():
    feasible = rich_evaluation({}, degradation=0.0042, speedup=1.25, bound=0.01)
    over = rich_evaluation({}, degradation=0.02, speedup=1.5, bound=0.01).replace(feasible=False)
    failed = Evaluation(params={}, state="failed", error="RuntimeError: no")
    bare = Evaluation(params={}, score=2.5)
    lines = lines_of([e.replace(seconds=2.0) for e in (over, feasible, failed, bare)])
    assert lines == [
        "[ 1/50] degradation +2.00%, over the bound, predicted speedup 1.500x | best - | 2.0 s"
        " | ETA 1 min 38 s",
        "[ 2/50] degradation +0.42%, speedup 1.250x | best 1.25 | 2.0 s | ETA 1 min 36 s",
        "[ 3/50] failed: RuntimeError: no | best 1.25 | 2.0 s | ETA 1 min 34 s",
        "[ 4/50] score 2.5 | best 2.5 | 2.0 s | ETA 1 min 32 s",
    ]


def test_a_slow_search_says_which_flag_cuts_it():
    # 20 s each, the sampler's time included: 47 more take 15 min 40 s.
    slow = [timed(18.0, suggestion_seconds=2.0)] * 4
    hints = [line for line in lines_of(slow) if "Slow optimization" in line]
    assert len(hints) == 1
    assert hints[0] in lines_of(slow)[3]
    assert "15 min 40 s" in hints[0]
    assert "47 evaluations of 20 s each" in hints[0]
    assert "--n_calls" in hints[0]
    assert "--max-samples" in hints[0]
    assert any("--n_points" in line for line in lines_of(slow, count_flag="--n_points"))


def test_a_search_within_ten_minutes_gives_no_hint():
    assert not any("Slow" in line for line in lines_of([timed(12.0)] * 4))


def test_quiet_says_nothing():
    assert lines_of([timed(100.0)] * 4, verbose=False) == []


def test_a_resumed_search_says_so_and_knows_the_best():
    done = [Evaluation(params={}, score=3.0)] * 2
    lines = lines_of([timed(1.0)], total=4, finished=done)
    assert lines[0] == "resuming: 2 of 4 evaluations are done"
    assert lines[1] == "[3/4] score 1 | best 3 | 1.0 s | ETA 1.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_search_writes_to_stderr(capsys):
    random_search(SmallObjective(), SMALL_SPACE, 3, seed=0)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert err.startswith("[1/3] degradation")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_on_a_terminal_there_is_a_bar_too():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        with SearchProgress(total=3, finished=[], stream=stream) as progress:
            progress.update(timed(1.0), 1)
        text = os.read(master, 65536).decode()
    os.close(master)
    assert "[1/3] score 1" in text
    assert "optimizing" in text
    assert "1/3" in text
    assert "ETA 2.0 s" in text
