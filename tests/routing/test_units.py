"""What a guard's unit is: a document, from its first token to the forward without it."""

from __future__ import annotations

import numpy as np
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import all_pairs
from var_moe.routing.units import Units

GIVEN = 2**40


def forward(units: Units, documents: tuple[int, ...], counted=None, **more) -> list[np.ndarray]:
    """A forward of three tokens a row; returns the documents that have ended before it."""
    ids = torch.zeros((len(documents), 3), dtype=torch.int64)
    counts = torch.ones(ids.shape, dtype=torch.bool) if counted is None else counted
    batch = ForwardContext(ids=ids, valid=counts, counted=counts, document=documents, **more)
    ended = units.begin(batch)
    index = torch.tensor([[0, 1]] * ids.numel())
    weight = torch.full(index.shape, 0.5)
    for layer in range(2):
        units.add(layer, all_pairs(index, weight), index, weight, counts.reshape(-1))
    return ended


def sizes(ended: list[np.ndarray]) -> list[float]:
    """Tokens of each unit."""
    assert all(unit.shape == (2, 13) for unit in ended)
    assert all((unit[0] == unit[1]).all() for unit in ended)
    return [float(unit[0, :3].sum()) for unit in ended]


def test_a_document_ends_with_the_forward_that_lacks_it() -> None:
    units = Units(2, drops_only=True)
    assert forward(units, (GIVEN, GIVEN + 1)) == []
    assert forward(units, (GIVEN, GIVEN + 1)) == []  # the next token of each
    assert sizes(forward(units, (GIVEN + 2,))) == [6, 6]
    assert sizes(units.end()) == [3]
    assert units.end() == []


def test_windows_of_one_document_are_one_unit() -> None:
    units = Units(2, drops_only=True)
    forward(units, (0, 0, 1))
    assert sizes(forward(units, (1, 2))) == [6]
    assert sizes(units.end()) == [6, 3]


def test_rows_without_a_number_end_with_their_forward() -> None:
    units = Units(2, drops_only=True)
    forward(units, (-2, -1))
    assert sizes(forward(units, (-2, -1))) == [3, 3]


def test_a_text_that_comes_back_is_no_new_document() -> None:
    units = Units(2, drops_only=True)
    forward(units, (GIVEN,))
    assert sizes(forward(units, (GIVEN + 1,))) == [3]
    assert sizes(forward(units, (GIVEN,))) == [3]
    assert forward(units, (GIVEN + 1,)) == []
    assert units.end() == []


def test_padding_and_beams_are_no_documents() -> None:
    units = Units(2, drops_only=True)
    nothing = torch.zeros((2, 3), dtype=torch.bool)
    nothing[1, 0] = True
    forward(units, (GIVEN, GIVEN + 1), counted=nothing)
    assert sizes(units.end()) == [1]
    forward(units, (GIVEN + 2,), inserting=False)
    assert units.end() == []
