import json
import logging
import math

import pytest

from var_moe.errors import UsageError
from var_moe.optimization.journal import SearchHeader, TrialJournal, alone_in
from var_moe.optimization.results import Evaluation

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


def evaluation(i):
    return Evaluation(params={"x": i / 10}, score=float(i))


@pytest.fixture
def path(tmp_path):
    """A journal of a search that has finished two of five evaluations."""
    path = tmp_path / "trials.jsonl"
    journal = TrialJournal(path)
    journal.begin(header())
    journal.append(0, evaluation(0))
    journal.append(1, evaluation(1))
    journal.close()
    return path


def resume(path, head=None):
    journal = TrialJournal(path)
    session = journal.begin(head or header(), resume=True)
    journal.close()
    return session


def test_what_was_written_is_read(path):
    session = resume(path)
    assert session.evaluations == [evaluation(0), evaluation(1)]
    assert session.header == header()


def test_a_line_is_on_disk_at_once(tmp_path):
    journal = TrialJournal(tmp_path / "j")
    journal.begin(header())
    journal.append(0, evaluation(0))
    assert len((tmp_path / "j").read_bytes().splitlines()) == 2
    journal.close()


@pytest.mark.parametrize("torn", [b'{"number": 2, "eval', b'{"number": 2}', b"\0\0\0\n"])
def test_a_torn_last_line_is_left_out(path, torn, caplog):
    path.write_bytes(path.read_bytes() + torn)
    journal = TrialJournal(path)
    with caplog.at_level(logging.WARNING):
        session = journal.begin(header(), resume=True)
    assert len(session.evaluations) == 2
    assert "torn" in caplog.text
    journal.append(2, evaluation(2))  # and does not join the next one
    journal.close()
    assert resume(path).evaluations == [evaluation(i) for i in range(3)]


def test_a_file_without_a_whole_header_is_a_new_search(path):
    path.write_bytes(path.read_bytes()[:20])
    assert resume(path).evaluations == []
    path.write_bytes(b"")
    assert resume(path).header == header()


def test_damage_in_the_middle_is_named(path):
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:10], lines[2], b""]))
    with pytest.raises(UsageError, match="line 2 is damaged"):
        resume(path)
    path.write_bytes(b"\n".join([lines[0], lines[2], b""]))
    with pytest.raises(UsageError, match="line 2 is not evaluation 0"):
        resume(path)
    path.write_bytes(b"[1, 2]\n")
    with pytest.raises(UsageError, match="no header"):
        resume(path)


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
def test_another_search_is_refused_by_the_field(path, changes, says):
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        resume(path, header(**changes))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_seed_and_number_come_from_the_first_run(path):
    session = resume(path, header(seed=None, total=500))
    assert (session.header.seed, session.header.total) == (3, 5)


def test_a_new_search_chooses_a_fresh_seed(tmp_path):
    seeds = set()
    for name in "ab":
        journal = TrialJournal(tmp_path / name)
        seeds.add(journal.begin(header(seed=None)).header.seed)
        journal.close()
        assert resume(tmp_path / name, header(seed=None)).header.seed in seeds
    assert len(seeds) == 2


def test_an_earlier_search_is_kept_aside(path):
    before = path.read_bytes()
    other = path.with_name("optuna_study.log")
    other.write_text("{}\n")
    journal = TrialJournal(path)
    assert journal.begin(header()).evaluations == []
    journal.close()
    assert path.with_name("trials.jsonl.previous").read_bytes() == before
    assert not other.exists()
    assert path.with_name("optuna_study.log.previous").exists()


def test_resuming_a_search_of_another_method(tmp_path):
    (tmp_path / "optuna_study.log").write_text("{}\n")
    with pytest.raises(UsageError, match="another method"):
        resume(tmp_path / "trials.jsonl")
    assert not (tmp_path / "trials.jsonl").exists()


@pytest.mark.parametrize("again", [True, False])
def test_one_run_at_a_time(path, again):
    journal = TrialJournal(path)
    journal.begin(header(), resume=True)
    with pytest.raises(UsageError, match="another run"):
        TrialJournal(path).begin(header(), resume=again)
    journal.append(2, evaluation(2))
    journal.close()
    assert len(resume(path).evaluations) == 3


def test_no_number_that_json_cannot_write(tmp_path):
    journal = TrialJournal(tmp_path / "j")
    journal.begin(header())
    journal.append(0, Evaluation(params={"x": float("nan")}, score=float("inf")))
    journal.close()
    line = json.loads((tmp_path / "j").read_text().splitlines()[1])
    assert (line["evaluation"]["params"], line["evaluation"]["score"]) == ({"x": None}, None)


def test_a_path_that_cannot_be_a_journal(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        TrialJournal(tmp_path / "file" / "j").begin(header())
    with pytest.raises(UsageError, match="is a folder"):
        TrialJournal(tmp_path).begin(header())


@pytest.mark.parametrize(
    "changed",
    [{"score": "1.0"}, {"params": []}, {"seconds": None}, {"complete": 1}, {"speedup": math.nan}],
)
def test_an_entry_that_was_edited_is_named_with_its_line(path, changed):
    lines = path.read_text().splitlines()
    line = json.loads(lines[2])
    line["evaluation"] |= changed
    path.write_text("\n".join([*lines[:2], json.dumps(line), ""]))
    (name,) = changed
    with pytest.raises(UsageError, match=rf"trials\.jsonl: line 3: {name} = "):
        resume(path)


def test_a_number_of_evaluations_that_is_none_is_named_with_its_line(path):
    with path.open("a") as file:
        file.write('{"total": "many"}\n')
    with pytest.raises(UsageError, match=r"trials\.jsonl: line 4: .*many"):
        resume(path)


def test_one_run_at_a_time_is_in_a_folder(tmp_path):
    folder = tmp_path / "a" / "results"
    with alone_in(folder), pytest.raises(UsageError, match="results: another run"):  # noqa: SIM117
        with alone_in(folder):
            pass
    assert not folder.exists()  # nothing was written
    with alone_in(folder):
        (folder / "x").write_text("")
    assert folder.is_dir()
