"""What the tests of several commands share."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from var_moe.cli import main


@pytest.fixture(scope="module")
def common(tiny_model_folder, tiny_text_folder):
    """Options that name the tiny model and its text."""
    return ["--model", str(tiny_model_folder), "--dataset", str(tiny_text_folder)]


@pytest.fixture
def killed():
    """Run a command in a process that is killed (kill -9) as soon as ``ready()``.

    It is a fork of this one: nothing is imported again, and fixtures hold in it too.
    """

    def run(words, ready):
        process = multiprocessing.get_context("fork").Process(target=main, args=(words,))
        process.start()
        deadline = time.monotonic() + 300
        while not ready() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert ready()

    return run


@pytest.fixture
def finished():
    """How many evaluations the log of a search holds as finished."""

    def count(folder):
        log = folder / "optuna_study.log"
        return log.read_text(errors="replace").count('"values":[') if log.exists() else 0

    return count
