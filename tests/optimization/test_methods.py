import json

import pytest
from analytic import SMALL_SPACE, SixObjective, SmallObjective, grid_points, kept

from var_moe.config import SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.methods import grid_search, random_search
from var_moe.optimization.search_space import defaults, sample


def points(result):
    return [e.params for e in result.evaluations]


def random_small(objective, n_calls=12, **more):
    return random_search(objective, SMALL_SPACE, n_calls, verbose=False, **more)


def grid_small(objective, n_points=3, **more):
    return grid_search(objective, SMALL_SPACE, n_points, verbose=False, **more)


def test_the_documented_call_of_grid_search():
    space = {name: SEARCH_SPACE[name] for name in ("entropy_threshold", "cache_size")}
    result = grid_search(
        objective_fn=lambda p: p["entropy_threshold"] - p["cache_size"] / 1e6,
        search_space=space,
        n_points_per_dim=3,
        verbose=False,
    )
    assert isinstance(result.best_params, VARConfig)
    assert result.best_params == VARConfig(entropy_threshold=1.5, cache_size=100)
    assert result.best_score == pytest.approx(1.4999)
    assert result.num_evaluations == 9 == len(result.all_results)
    assert result.all_results[0]["params"] == {"entropy_threshold": 0.1, "cache_size": 100}
    assert result.all_results[0]["score"] == pytest.approx(0.0999)
    assert result.optimization_time > 0
    assert result.converged is False
    assert result.method == "grid"


def test_the_grid_is_evaluated_in_order():
    assert points(grid_small(SmallObjective())) == grid_points(SMALL_SPACE, 3)


def test_random_points_come_from_seed_and_index():
    result = random_small(SmallObjective(), seed=4)
    assert points(result) == [sample(SMALL_SPACE, 4, i) for i in range(12)]
    assert result.seed == 4
    assert points(random_small(SmallObjective(), seed=5)) != points(result)


def test_without_a_seed_each_run_differs_and_records_its_own():
    first, second = random_small(SmallObjective()), random_small(SmallObjective())
    assert points(first) != points(second)
    assert points(random_small(SmallObjective(), seed=first.seed)) == points(first)


@pytest.mark.parametrize("search", [random_small, grid_small])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_resumed_search_equals_an_unbroken_one(search, stop, tmp_path):
    unbroken = search(SmallObjective(), seed=7)
    path = tmp_path / "j"
    with pytest.raises(stop, match="stopped"):
        search(SmallObjective(stop_at=6, stop=stop), seed=7, storage=path)
    rest = SmallObjective()
    resumed = search(rest, storage=path, resume=True)
    assert kept(resumed) == kept(unbroken)
    assert len(rest.seen) == unbroken.num_evaluations - 5
    assert (resumed.best_params, resumed.best_score) == (unbroken.best_params, unbroken.best_score)
    assert (resumed.seed, resumed.converged) == (7, unbroken.converged)
    assert resumed.extra["resumed"] == 5
    # Resuming a finished search evaluates nothing.
    rest = SmallObjective()
    assert kept(search(rest, storage=path, resume=True)) == kept(unbroken)
    assert rest.seen == []


def test_a_resumed_search_goes_on_to_the_number_asked_for(tmp_path, caplog):
    path = tmp_path / "j"
    with pytest.raises(KeyboardInterrupt):
        random_small(SmallObjective(stop_at=3), 6, seed=1, storage=path)

    def number(n_calls):
        found = random_small(SmallObjective(), n_calls, storage=path, resume=True)
        assert found.extra["total"] == found.num_evaluations
        return found.num_evaluations

    assert number(None) == 6  # as many as it was begun with
    assert number(9) == 9
    assert number(None) == 9
    assert number(4) == 9
    assert "9 evaluations are done, more than the 4 asked for" in caplog.text
    unbroken = random_small(SmallObjective(), 9, seed=1)
    resumed = random_small(SmallObjective(), 9, storage=path, resume=True)
    assert kept(resumed) == kept(unbroken)


def test_other_settings_are_refused(tmp_path):
    random_small(SmallObjective(), 2, seed=1, storage=tmp_path / "j", settings={"data": "a"})
    for changes in ({"settings": {"data": "b"}}, {"mode": "plain", "settings": {"data": "a"}}):
        with pytest.raises(UsageError, match=r"begun with settings\.(data|mode)"):
            random_small(SmallObjective(), 2, storage=tmp_path / "j", resume=True, **changes)

    class Looser(SmallObjective):
        max_degradation = 0.02

    with pytest.raises(UsageError, match=r"settings\.max_degradation = 0\.01, now 0\.02"):
        random_small(Looser(), 2, storage=tmp_path / "j", resume=True, settings={"data": "a"})
    grid_small(SmallObjective(), 2, storage=tmp_path / "g")
    with pytest.raises(UsageError, match="n_points_per_dim = 2, now 3"):
        grid_small(SmallObjective(), 3, storage=tmp_path / "g", resume=True)


def test_a_failing_evaluation_does_not_end_the_search():
    result = random_small(SmallObjective(fail_at=(1, 4)), seed=2)
    assert [e.state for e in result.evaluations].count("failed") == 2 == result.extra["failed"]
    assert result.num_evaluations == 12
    assert result.evaluations[3].error == "RuntimeError: out of memory"
    assert result.best_score > 1


def test_when_everything_fails():
    result = random_small(lambda p: p["z"], 3)
    assert result.best_score != result.best_score  # NaN
    assert result.best_params == defaults(SMALL_SPACE)
    assert "nearest_miss" not in result.extra


def test_when_nothing_is_feasible():
    class Strict(SixObjective):
        max_degradation = 1e-9

    result = random_search(Strict(), n_calls=5, verbose=False, seed=0, mode="plain")
    assert result.best_params == VARConfig(mode="plain")
    assert result.best_score == max(e.score for e in result.evaluations) < -100
    least = min(result.evaluations, key=lambda e: e.degradation)
    assert result.extra["nearest_miss"]["params"] == least.params
    assert result.converged is False
    json.dumps(result.extra, allow_nan=False)


def test_the_mode_of_the_best_configuration():
    assert random_search(SixObjective(), n_calls=3, verbose=False).best_params.mode == "verified"
    plain = random_search(SixObjective(), n_calls=3, verbose=False, mode="plain")
    assert plain.best_params.mode == "plain"
    objective = SmallObjective()
    with pytest.raises(UsageError, match="mode"):
        random_search(objective, n_calls=3, verbose=False, mode="fast")
    assert objective.seen == []


def test_a_space_of_other_names_gives_a_dict():
    result = random_small(SmallObjective(), seed=1)
    assert type(result.best_params) is dict
    assert result.best_params == max(result.evaluations, key=lambda e: e.score).params


def test_an_early_stop():
    objective = SmallObjective()
    result = random_small(objective, should_stop=lambda: len(objective.seen) == 4)
    assert (result.num_evaluations, result.extra["stopped_early"]) == (4, True)


@pytest.mark.parametrize("bad", [{"n_calls": 0}, {"n_calls": 2.5}, {"seed": -1}, {"seed": "x"}])
def test_bad_arguments(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        random_search(SmallObjective(), SMALL_SPACE, verbose=False, **bad)
    with pytest.raises(UsageError, match="n_points_per_dim"):
        grid_small(SmallObjective(), 0)
    with pytest.raises(UsageError, match="resume"):
        random_small(SmallObjective(), resume=True)
