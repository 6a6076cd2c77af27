import itertools
import math

import pytest
from analytic import grid_points, is_point
from hypothesis import given, settings
from hypothesis import strategies as st

from var_moe.config import SEARCH_SPACE
from var_moe.errors import UsageError
from var_moe.optimization.search_space import (
    defaults,
    dimensions,
    fresh_sample,
    grid_size,
    parse_bounds,
    point_count,
    sample,
    starting_points,
)

ONE = {"x": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}}
TAU = {"tau": {"type": "float", "low": 1e-4, "high": 1.0, "log": True}}
COUNT = {"n": {"type": "int", "low": 1, "high": 1000, "default": 10, "log": True}}


def test_the_documented_space():
    rows = [(n, e["type"], e["low"], e["high"], e["default"]) for n, e in SEARCH_SPACE.items()]
    assert rows == [
        ("frequency_threshold", "int", 10, 200, 50),
        ("entropy_threshold", "float", 0.1, 1.5, 0.5),
        ("confidence_threshold", "float", 0.5, 0.95, 0.8),
        ("cache_size", "int", 100, 5000, 1000),
        ("cache_ttl_seconds", "int", 10, 300, 60),
        ("context_window_size", "int", 2, 8, 4),
    ]
    assert all(list(e) == ["type", "low", "high", "default"] for e in SEARCH_SPACE.values())


@st.composite
def spaces(draw):
    space = {}
    for name in draw(st.lists(st.text("abc", min_size=1), min_size=1, max_size=4, unique=True)):
        if draw(st.booleans()):
            low, high = sorted(draw(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))))
            kind = "float" if draw(st.booleans()) else "int"
            if kind == "int":
                low, high = math.ceil(low), math.ceil(high)
            space[name] = {"type": kind, "low": low, "high": high, "log": True}
        elif draw(st.booleans()):
            low, high = sorted(draw(st.tuples(st.integers(-50, 50), st.integers(-50, 50))))
            space[name] = {"type": "int", "low": low, "high": high}
        else:
            low, high = sorted(draw(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))))
            space[name] = {"type": "float", "low": low, "high": high}
    return space


@settings(deadline=None, max_examples=60)
@given(spaces(), st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_a_sample_depends_on_seed_and_index_alone(space, seed, index):
    first = sample(space, seed, index)
    sample(space, seed + 1, index + 1)
    assert sample(space, seed, index) == first
    assert is_point(space, first)


def test_samples_cover_an_integer_range_evenly():
    space = {"n": {"type": "int", "low": 3, "high": 6, "default": 3}}
    drawn = [sample(space, 0, i)["n"] for i in range(1000)]
    assert set(drawn) == {3, 4, 5, 6}
    assert all(abs(drawn.count(n) / 1000 - 0.25) < 0.05 for n in set(drawn))


def test_samples_of_neighbouring_seeds_and_indices_differ():
    points = {tuple(sample(SEARCH_SPACE, s, i).values()) for s in range(20) for i in range(20)}
    assert len(points) == 400


def test_narrowing_one_range_leaves_the_other_draws():
    wide = sample(SEARCH_SPACE, 1, 2)
    narrow = sample(parse_bounds(["cache_size=100:101"], SEARCH_SPACE), 1, 2)
    assert {n for n in wide if wide[n] != narrow[n]} == {"cache_size"}


def test_a_fresh_sample_is_not_a_known_point():
    space = {"n": {"type": "int", "low": 0, "high": 3, "default": 0}}
    known = [{"n": 0}, {"n": 1}, {"n": 3}]
    assert [fresh_sample(space, seed, 0, known) for seed in range(8)] == [{"n": 2}] * 8
    # A space that is used up repeats instead of hanging.
    assert fresh_sample(space, 0, 0, [*known, {"n": 2}])["n"] in range(4)


def test_grid_counts_and_corners():
    assert grid_size(SEARCH_SPACE, 3) == 729
    assert grid_size(SEARCH_SPACE, 10) == 7 * 10**5  # the window has seven values
    points = grid_points(SEARCH_SPACE, 2)
    assert len(points) == 64 == len({tuple(p.values()) for p in points})
    assert points[0] == {n: e["low"] for n, e in SEARCH_SPACE.items()}
    assert points[-1] == {n: e["high"] for n, e in SEARCH_SPACE.items()}
    assert points[1] == {**points[0], "context_window_size": 8}
    assert grid_points(SEARCH_SPACE, 1) == [defaults(SEARCH_SPACE)]


def test_grid_integers_are_rounded_without_repeats():
    space = {"n": {"type": "int", "low": 0, "high": 3, "default": 0}, **ONE}
    assert [p["n"] for p in grid_points(space, 3)][::3] == [0, 2, 3]
    assert grid_size(space, 9) == 4 * 9
    assert all(type(p["n"]) is int for p in grid_points(space, 9))


@settings(deadline=None, max_examples=40)
@given(spaces(), st.integers(1, 4))
def test_a_grid_point_by_its_index(space, n_points):
    values = [d.grid(n_points) for d in dimensions(space)]
    points = [dict(zip(space, row, strict=True)) for row in itertools.product(*values)]
    assert grid_points(space, n_points) == points
    assert all(is_point(space, p) for p in points)


def test_starting_points_are_the_default_and_the_presets():
    points = starting_points(SEARCH_SPACE)
    # The balanced preset is the default.
    assert [p["frequency_threshold"] for p in points] == [50, 100, 25]
    assert points[0] == defaults(SEARCH_SPACE)
    assert starting_points(ONE) == [{"x": 0.5}]


def test_presets_outside_the_bounds_are_clipped():
    space = parse_bounds(["frequency_threshold=60:80"], SEARCH_SPACE)
    assert [p["frequency_threshold"] for p in starting_points(space)] == [60, 80, 60]
    one = {"entropy_threshold": SEARCH_SPACE["entropy_threshold"]}
    assert [p["entropy_threshold"] for p in starting_points(one)] == [0.5, 0.3, 0.7]


def test_bounds():
    space = parse_bounds(["cache_size = 10:9000", "entropy_threshold=0.6:2"], SEARCH_SPACE)
    assert space["cache_size"] == {"type": "int", "low": 10, "high": 9000, "default": 1000}
    expected = {"type": "float", "low": 0.6, "high": 2.0, "default": 0.6}
    assert space["entropy_threshold"] == expected
    assert SEARCH_SPACE["cache_size"]["low"] == 100  # the original is not touched
    assert list(space) == list(SEARCH_SPACE)
    fixed = parse_bounds(["cache_size=700:700"], SEARCH_SPACE)["cache_size"]
    assert (fixed["low"], fixed["high"], fixed["default"]) == (700, 700, 700)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cache_size", "expected name=low:high"),
        ("cache_size=5", "expected name=low:high"),
        ("cachesize=1:2", "unknown name 'cachesize'"),
        ("cache_size=1:many", "'many' is not a number"),
        ("cache_size=1.5:9", "low = 1.5: expected an integer"),
        ("entropy_threshold=0:inf", "high = inf: expected a finite number"),
        ("entropy_threshold=nan:1", "low = nan: expected a finite number"),
        ("entropy_threshold=1:0.5", "low = 1.0 is above high = 0.5"),
        ("entropy_threshold=-1:1", "VARConfig.entropy_threshold = -1.0"),
        ("confidence_threshold=0.5:1.5", "VARConfig.confidence_threshold = 1.5"),
        ("context_window_size=0:4", "VARConfig.context_window_size = 0"),
    ],
)
def test_bad_bounds_name_the_text_and_the_fault(text, says):
    with pytest.raises(UsageError) as caught:
        parse_bounds([text], SEARCH_SPACE)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounds_given_twice():
    with pytest.raises(UsageError, match="given twice"):
        parse_bounds(["cache_size=1:2", "cache_size=1:3"], SEARCH_SPACE)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "at least one name"),
        ([("x", 1)], "expected a mapping"),
        ({"x": 3}, "search space: x"),
        ({"x": {"type": "real", "low": 0, "high": 1}}, "expected 'int', 'float' or 'choice'"),
        ({"x": {"type": "choice", "choices": []}}, "with a list of choices"),
        ({"x": {"type": "choice", "choices": ["a"], "default": "b"}}, "default = 'b'"),
        ({"x": {"type": "int", "low": 0, "high": 1.5}}, "high = 1.5: expected an integer"),
        ({"x": {"type": "float", "low": 0}}, "high = None"),
        ({"x": {"type": "int", "low": True, "high": 4}}, "low = True"),
        ({"x": {"type": "float", "low": 0, "high": float("inf")}}, "high = inf"),
        ({"x": {"type": "int", "low": 0, "high": 4, "default": 5}}, "default = 5"),
        ({"x": {"type": "int", "low": 0, "high": 4, "step": 2}}, "unknown key 'step'"),
        ({"x": {"type": "float", "low": 0, "high": 4, "log": True}}, "low = 0.0: expected a value"),
        ({"x": {"type": "int", "low": -1, "high": 4, "log": True}}, "low = -1: expected a value"),
        ({"x": {"type": "float", "low": 1, "high": 4, "log": "yes"}}, "log = 'yes'"),
    ],
)
def test_bad_spaces_are_refused_by_name(space, says):
    with pytest.raises(UsageError) as caught:
        dimensions(space)
    assert says in str(caught.value)


def test_a_missing_default_is_the_middle():
    assert defaults({"n": {"type": "int", "low": 1, "high": 4}}) == {"n": 2}
    assert defaults(TAU)["tau"] == pytest.approx(1e-2)
    assert defaults({"n": {**COUNT["n"], "default": 1000}}) == {"n": 1000}
    wide = {"tau": {"type": "float", "low": 1e-300, "high": 1e300, "log": True}}
    assert defaults(wide)["tau"] == pytest.approx(1.0)
    assert 1e-300 <= sample(wide, 0, 0)["tau"] <= 1e300


def test_a_logarithmic_range_is_drawn_evenly_over_its_orders_of_magnitude():
    drawn = [sample(TAU, 0, i)["tau"] for i in range(2000)]
    decades = [math.floor(math.log10(value)) for value in drawn]
    assert set(decades) == {-4, -3, -2, -1}
    assert all(abs(decades.count(d) / 2000 - 0.25) < 0.05 for d in set(decades))
    counts = [sample(COUNT, 0, i)["n"] for i in range(2000)]
    # Of the logarithm up to 1001: 1 takes ln 2, those below 10 ln 10, of ln 1001.
    assert counts.count(1) / 2000 == pytest.approx(math.log(2) / math.log(1001), abs=0.03)
    share = sum(n < 10 for n in counts) / 2000
    assert share == pytest.approx(math.log(10) / math.log(1001), abs=0.03)


def test_a_logarithmic_grid_is_geometric():
    assert [p["tau"] for p in grid_points(TAU, 5)] == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    assert [p["n"] for p in grid_points(COUNT, 4)] == [1, 10, 100, 1000]
    assert all(type(p["n"]) is int for p in grid_points(COUNT, 4))


def test_a_step_is_a_factor_on_a_logarithmic_scale_alone():
    (tau,), (x,) = dimensions(TAU), dimensions(ONE)
    assert tau.span == pytest.approx(4 * math.log(10))
    assert tau.moved(1e-3, math.log(10)) == pytest.approx(1e-2)
    assert tau.moved(1e-3, -3 * tau.span) == 1e-4
    assert (x.span, x.moved(0.5, 0.25), x.moved(0.5, 2.0)) == (1.0, 0.75, 1.0)


def test_a_scale_survives_bounds_and_is_checked_against_them():
    space = parse_bounds(["tau=0.01:0.5"], TAU)["tau"]
    expected = {"type": "float", "low": 0.01, "high": 0.5, "log": True}
    assert {key: space[key] for key in expected} == expected
    assert space["default"] == pytest.approx(0.01)
    assert "log" not in dimensions(ONE)[0].to_dict()
    with pytest.raises(UsageError, match=r"tau: low = 0"):
        parse_bounds(["tau=0:1"], TAU)


STAND_IN = {"type": "choice", "choices": ["none", "means", "learned"], "default": "learned"}
WITH_NAMES = {"tau": {"type": "float", "low": 0.0, "high": 1.0}, "compensation": STAND_IN}


def test_names_to_choose_from():
    """Each is among the first points, in every grid, and has its turn among random ones."""
    names = set(STAND_IN["choices"])
    start = starting_points(WITH_NAMES)
    assert start[0] == {"tau": 0.5, "compensation": "learned"}
    assert {point["compensation"] for point in start} == names
    for seed in range(5):
        drawn = [sample(WITH_NAMES, seed, number) for number in range(3)]
        assert {point["compensation"] for point in drawn} == names
    assert grid_size(WITH_NAMES, 1) == 3
    assert [point["compensation"] for point in grid_points(WITH_NAMES, 1)] == STAND_IN["choices"]
    assert point_count({"compensation": STAND_IN}) == 3
    assert is_point(WITH_NAMES, start[1])
    with pytest.raises(UsageError, match="compensation has no range"):
        parse_bounds(["compensation=0:1"], WITH_NAMES)
