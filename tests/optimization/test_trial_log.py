"""Where trials are kept: files and databases, new, damaged, in use, and of another search."""

import json
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from analytic import SMALL_SPACE, SmallObjective

from var_moe.errors import UsageError
from var_moe.optimization.methods import random_search
from var_moe.optimization.search_space import sample
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.trial_log import (
    LOG_NAME,
    SearchHeader,
    check_storage,
    has_search,
    open_study,
    shown,
)

SPACE = {"x": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}}


def header(**changes):
    values = {
        "method": "random",
        "seed": 3,
        "total": 5,
        "space": SPACE,
        "settings": {"mode": "verified", "data": {"hash": "abc"}},
    }
    return SearchHeader(**{**values, **changes})


def search(storage, n_calls=None, **more):
    more = {"verbose": False, "resume": True, **more}
    return random_search(SmallObjective(), SMALL_SPACE, n_calls, storage=storage, **more)


@pytest.fixture
def path(tmp_path):
    """The log of a search that has finished two of five evaluations."""
    path = tmp_path / LOG_NAME
    stop = iter([False, False, True]).__next__
    search(path, 5, seed=3, resume=False, should_stop=stop)
    return path


def points(number):
    return [sample(SMALL_SPACE, 3, index) for index in range(number)]


def test_what_was_written_is_read(path):
    result = search(path)
    assert [e.params for e in result.evaluations] == points(5)
    assert (result.seed, result.extra["resumed"], result.extra["total"]) == (3, 2, 5)


@pytest.mark.parametrize("torn", [b'{"number": 2, "eval', b'{"number": 2}'])
def test_a_torn_last_line_is_left_out(path, torn, caplog):
    path.write_bytes(path.read_bytes() + torn)
    with caplog.at_level(logging.WARNING):
        assert search(path).extra["resumed"] == 2
    assert "torn" in caplog.text
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_line_that_another_process_left_torn_does_not_join_the_next(path, caplog):
    class Sharing(SmallObjective):
        """While it evaluates, another process is killed as it writes."""

        def evaluate(self, params):
            with path.open("ab") as log:
                log.write(b'{"op_code": 5, "wor')
            return super().evaluate(params)

    result = random_search(Sharing(), SMALL_SPACE, verbose=False, storage=path, resume=True)
    assert [e.params for e in result.evaluations] == points(5)
    assert "torn" in caplog.text


def test_a_file_without_a_whole_line_is_a_new_search(path):
    path.write_bytes(path.read_bytes()[:20])
    assert search(path, 1).extra["resumed"] == 0
    path.write_bytes(b"")
    assert not has_search(path)
    assert search(path, 1).extra["resumed"] == 0


def test_damage_in_the_middle_is_named(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{...\n", *lines[4:]]))
    with pytest.raises(UsageError, match=r"optuna_study\.log: damaged, or not a study"):
        search(path)
    path.write_bytes(b"[1, 2]\n")
    with pytest.raises(UsageError, match="or not a study of this version"):
        search(path)


@pytest.mark.parametrize("changed", [{"score": "1.0"}, {"params": []}])
def test_an_entry_that_was_edited_is_named(path, changed):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "evaluation" in line.get("user_attr", {}):
            line["user_attr"]["evaluation"] |= changed
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (name,) = changed
    with pytest.raises(UsageError, match=rf"trial 0: {name} = "):
        search(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "grid"}, "method = 'random', now 'grid'"),
        ({"seed": 4}, "seed = 3, now 4"),
        ({"space": {"x": {**SPACE["x"], "low": 0.1}}}, "space.x.low = 0.0, now 0.1"),
        ({"space": {**SPACE, "y": SPACE["x"]}}, "space"),
        ({"settings": {"mode": "plain", "data": {"hash": "abc"}}}, "settings.mode = 'verified'"),
        (
            {"settings": {"mode": "verified", "data": {"hash": "abd"}}},
            "settings.data.hash = 'abc', now 'abd'",
        ),
        ({"settings": {"mode": "verified"}}, "settings.data.hash = 'abc', now None"),
    ],
)
def test_another_search_is_refused_by_the_field(tmp_path, changes, says):
    path = tmp_path / LOG_NAME
    with open_study(path, header(), resume=False):
        pass
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught, open_study(path, header(**changes), resume=True):
        pass
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_seed_and_number_come_from_the_first_run(tmp_path):
    path, seeds = tmp_path / LOG_NAME, set()
    for storage in (path, tmp_path / "b.log"):
        with open_study(storage, header(seed=None), resume=True) as (_, first):
            seeds.add(first.seed)
        with open_study(storage, header(seed=None, total=500), resume=True) as (_, again):
            assert again == first
    assert len(seeds) == 2  # fresh ones


def test_an_earlier_search_is_kept_aside(path):
    before = path.read_bytes()
    assert search(path, 1, resume=False).extra["resumed"] == 0
    assert path.with_name(LOG_NAME + ".previous").read_bytes() == before


def test_a_file_in_use_is_not_set_aside(path):
    class Asking(SmallObjective):
        def evaluate(self, params):
            with pytest.raises(UsageError, match="another run is using it; join it by resume"):
                search(path, 1, resume=False)
            return super().evaluate(params)

    result = random_search(Asking(), SMALL_SPACE, verbose=False, storage=path, resume=True)
    assert (result.num_evaluations, result.extra["failed"]) == (5, 0)


def test_a_lock_of_optuna_is_never_waited_for(tmp_path, monkeypatch):
    """Its lock files outlive a killed process by half a minute; ours is the system's."""

    def wait(self):
        raise AssertionError("waiting for a lock file")

    for name in ("JournalFileOpenLock", "JournalFileSymlinkLock"):
        monkeypatch.setattr(f"optuna.storages.journal.{name}.acquire", wait)
    assert search(tmp_path / LOG_NAME, 2).num_evaluations == 2


def test_a_path_that_cannot_be_a_log(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        search(tmp_path / "file" / "j", 1)
    with pytest.raises(UsageError, match="is a folder"):
        search(tmp_path, 1)


def test_a_database_holds_one_search(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"
    assert not has_search(url)
    search(url, 3, seed=1, resume=False)
    assert has_search(url)
    for refused in (lambda: search(url, 3, resume=False), lambda: check_storage(url, resume=False)):
        with pytest.raises(UsageError, match=r"t\.db: holds a search already"):
            refused()
    assert search(url, 5).extra["resumed"] == 3
    with pytest.raises(UsageError, match="seed = 1, now 2"):
        search(url, 5, seed=2)


def test_a_waiting_trial_of_a_database_is_given_out_once(tmp_path):
    """Each thread has a storage of its own, as a process has."""
    url, taken = f"sqlite:///{tmp_path}/t.db", []
    together = threading.Barrier(4, timeout=60)

    def take(_number):
        with open_study(url, header(), resume=True) as (study, _):
            together.wait()
            while "queued" in (trial := study.ask()).user_attrs:
                taken.append(trial.number)

    with open_study(url, header(), resume=False) as (study, _):
        for _ in range(8):
            study.enqueue_trial({}, user_attrs={"queued": True})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
    assert sorted(taken) == list(range(8))


def test_a_storage_of_optuna(tmp_path):
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/t.db")
    assert search(storage, 2).num_evaluations == 2
    assert search(storage, 3).extra["resumed"] == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:////no/such/folder/t.db", "can't be used (unable to open database file)"),
        ("oracle9://host/db", "can't be used (Can't load plugin: sqlalchemy.dialects:oracle9)"),
        ("postgresql://ann:secret@127.0.0.1:9/db", "its driver is not installed"),
    ],
)
def test_a_database_that_cannot_be_used(url, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for attempt in (lambda: search(url, 1), lambda: check_storage(url, resume=False)):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert says in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_password_is_not_shown(tmp_path):
    url = "postgresql://ann:secret@host/db"
    assert shown(url) == "postgresql://ann:***@host/db"
    assert shown(tmp_path / "x") == str(tmp_path / "x")
    own = f"sqlite:///{tmp_path}/t.db"
    assert TuneSettings(storage=own, output=tmp_path).to_dict()["storage"] == own


def test_a_study_of_another_program(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"
    study = optuna.create_study(storage=url, study_name="var_moe")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UsageError, match="holds a study of another program"):
        search(url, 1)
