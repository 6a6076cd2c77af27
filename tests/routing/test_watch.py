"""What a guard's unit is: a document, from its first token to the forward without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import all_pairs
from var_moe.routing.watch import Units

GIVEN = 2**40


@pytest.fixture
def shown() -> list[np.ndarray]:
    """Takes the documents that have ended."""
    return []


@pytest.fixture
def units(shown: list[np.ndarray]) -> Units:
    made = Units(2, drops_only=True, ended=shown.append)
    made.taken = lambda: [shown.pop(0) for _ in list(shown)]
    return made


def end(units: Units) -> list[np.ndarray]:
    units.end_documents()
    return units.taken()


def forward(units: Units, documents: tuple[int, ...], counted=None, **more) -> list[np.ndarray]:
    """A forward of three tokens a row; returns the documents that have ended before it."""
    ids = torch.zeros((len(documents), 3), dtype=torch.int64)
    counts = torch.ones(ids.shape, dtype=torch.bool) if counted is None else counted
    context = ForwardContext(ids=ids, valid=counts, counted=counts, document=documents, **more)
    units.begin(context)
    ended = units.taken()
    index = torch.tensor([[0, 1]] * ids.numel())
    weight = torch.full(index.shape, 0.5)
    for layer in range(2):
        units.see(layer, context, all_pairs(index, weight), index, weight)
    units.end()
    return ended


def sizes(ended: list[np.ndarray]) -> list[float]:
    """Tokens of each unit."""
    assert all(unit.shape == (2, 14) for unit in ended)
    assert all((unit[0] == unit[1]).all() for unit in ended)
    return [float(unit[0, :3].sum()) for unit in ended]


def test_a_document_ends_with_the_forward_that_lacks_it(units: Units) -> None:
    assert forward(units, (GIVEN, GIVEN + 1)) == []
    assert forward(units, (GIVEN, GIVEN + 1)) == []  # the next token of each
    assert sizes(forward(units, (GIVEN + 2,))) == [6, 6]
    assert sizes(end(units)) == [3]
    assert end(units) == []


def test_windows_of_one_document_are_one_unit(units: Units) -> None:
    forward(units, (0, 0, 1))
    assert sizes(forward(units, (1, 2))) == [6]
    assert sizes(end(units)) == [6, 3]


def test_rows_without_a_number_end_with_their_forward(units: Units) -> None:
    forward(units, (-2, -1))
    assert sizes(forward(units, (-2, -1))) == [3, 3]


def test_a_text_that_comes_back_is_no_new_document(units: Units) -> None:
    forward(units, (GIVEN,))
    assert sizes(forward(units, (GIVEN + 1,))) == [3]
    assert sizes(forward(units, (GIVEN,))) == [3]
    assert forward(units, (GIVEN + 1,)) == []
    assert end(units) == []


def test_padding_and_beams_are_no_documents(units: Units) -> None:
    nothing = torch.zeros((2, 3), dtype=torch.bool)
    nothing[1, 0] = True
    forward(units, (GIVEN, GIVEN + 1), counted=nothing)
    assert sizes(end(units)) == [1]
    forward(units, (GIVEN + 2,), inserting=False)
    assert end(units) == []
