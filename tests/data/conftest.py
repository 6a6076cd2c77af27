"""Writing local files, and reading the one line of a refusal."""

from __future__ import annotations

import pytest

from var_moe.errors import UsageError


@pytest.fixture
def refused():
    """The one line of a refusal."""

    def run(call, *words, **options):
        with pytest.raises(UsageError) as caught:
            call(*words, **options)
        line = str(caught.value)
        assert "\n" not in line
        return line

    return run


@pytest.fixture
def write(tmp_path):
    def run(name, content):
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(data)
        return path

    return run
