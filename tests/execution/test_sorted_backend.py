"""Our experts backend against one pair at a time through the module's own forward."""

from __future__ import annotations

import torch

from var_moe.execution.backends import sorted as room
from var_moe.execution.backends.sorted import SortedBackend


def one_by_one(module, hidden, index):
    """(T, K, D), each pair alone through the module's own forward."""
    forward = type(module).forward.__wrapped__
    out = torch.zeros(*index.shape, hidden.shape[1])
    for token, slot in (index >= 0).nonzero().tolist():
        row = hidden[token : token + 1]
        out[token, slot] = forward(module, row, index[token, slot].view(1, 1), torch.ones(1, 1))
    return out


@torch.no_grad()
def test_every_pair_gets_its_own_expert(module, pairs):
    got = SortedBackend().pairs(module, *pairs)
    torch.testing.assert_close(got, one_by_one(module, *pairs), rtol=1e-4, atol=1e-4)
    assert (got[pairs[1] < 0] == 0).all()


@torch.no_grad()
def test_buffers_are_used_again_without_touching_what_was_returned(module, pairs):
    backend = SortedBackend()
    first = backend.pairs(module, *pairs)
    copy = first.clone()
    backend.pairs(module, -pairs[0], pairs[1].flip(0))
    assert torch.equal(first, copy)
    with torch.inference_mode():  # and between modes
        assert torch.equal(backend.pairs(module, *pairs), copy)
    assert torch.equal(backend.pairs(module, *pairs), copy)


@torch.no_grad()
def test_many_rows_run_in_pieces(module, pairs, monkeypatch):
    whole = SortedBackend().pairs(module, *pairs)
    # Six rows at a time.
    monkeypatch.setattr(room, "_SCRATCH_ELEMENTS", 6 * module.gate_up_proj.shape[1])
    backend = SortedBackend()
    torch.testing.assert_close(backend.pairs(module, *pairs), whole, rtol=1e-4, atol=1e-4)
    wide = next(v for k, v in backend._scratch._held.items() if k[0] == "wide")
    assert wide.numel() <= 6 * module.gate_up_proj.shape[1]


def test_gradients_flow_where_they_are_wanted(module, pairs):
    hidden = pairs[0].clone().requires_grad_()
    out = SortedBackend().pairs(module, hidden, pairs[1])
    out.square().sum().backward()
    (expected,) = torch.autograd.grad(one_by_one_sum(module, hidden, pairs[1]), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-3, atol=1e-4)


def one_by_one_sum(module, hidden, index):
    forward = type(module).forward.__wrapped__
    total = hidden.new_zeros(())
    for token, slot in (index >= 0).nonzero().tolist():
        row = hidden[token : token + 1]
        out = forward(module, row, index[token, slot].view(1, 1), torch.ones(1, 1))
        total = total + out.square().sum()
    return total


@torch.no_grad()
def test_no_pair_at_all(module, pairs):
    hidden, index = pairs
    assert (SortedBackend().pairs(module, hidden, torch.full_like(index, -1)) == 0).all()


@torch.no_grad()
def test_a_lone_token_is_run_as_among_others(module, pairs):
    hidden, index = pairs
    backend = SortedBackend()
    for token in (0, 1, 7, 29):  # one pair dropped, none, both
        row = hidden[token : token + 1], index[token : token + 1]
        torch.testing.assert_close(backend.pairs(module, *row), one_by_one(module, *row))
