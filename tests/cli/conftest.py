"""What the tests of several commands share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def common(tiny_model_folder, tiny_text_folder):
    """Options that name the tiny model and its text."""
    return ["--model", str(tiny_model_folder), "--dataset", str(tiny_text_folder)]
