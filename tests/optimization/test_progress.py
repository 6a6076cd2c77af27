"""What a search says while it runs."""

from dataclasses import replace

import pytest
from analytic import SMALL_SPACE, SmallObjective, rich_evaluation

from var_moe.optimization.methods import progress_line, random_search
from var_moe.optimization.results import Evaluation
from var_moe.optimization.trial_log import LOG_NAME
from var_moe.terminal import duration


def test_a_line_per_evaluation():
    over = rich_evaluation({}, degradation=0.02, speedup=1.5, bound=0.01)
    feasible = rich_evaluation({}, degradation=0.0042, speedup=1.25, bound=0.01)
    failed = Evaluation(params={}, state="failed", error="RuntimeError: no")
    bare = Evaluation(params={}, score=2.5)
    made = [
        # The sampler's time counts as well.
        replace(one, seconds=1.5, suggestion_seconds=0.5)
        for one in (replace(over, feasible=False), feasible, failed, bare)
    ]
    lines = [progress_line(one, made[: number + 1], 50) for number, one in enumerate(made)]
    assert lines == [
        "[ 1/50] degradation +2.00%, over the bound, predicted speedup 1.500x | best - | 1.5 s"
        " | ETA 1 min 38 s",
        "[ 2/50] degradation +0.42%, speedup 1.250x | best 1.25 | 1.5 s | ETA 1 min 36 s",
        "[ 3/50] failed: RuntimeError: no | best 1.25 | 1.5 s | ETA 1 min 34 s",
        "[ 4/50] score 2.5 | best 2.5 | 1.5 s | ETA 1 min 32 s",
    ]


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


def test_a_search_writes_to_stderr(capsys, tmp_path):
    def lines(n_calls, **more):
        options = {"seed": 0, "storage": tmp_path / LOG_NAME, **more}
        random_search(SmallObjective(), SMALL_SPACE, n_calls, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    assert [line.partition("]")[0] for line in lines(3)] == ["[1/3", "[2/3", "[3/3"]
    resumed = lines(4, resume=True)
    assert resumed[0] == "resuming: 3 of 4 evaluations are done"
    assert resumed[1].startswith("[4/4] degradation")
    assert lines(5, resume=True, verbose=False) == []
