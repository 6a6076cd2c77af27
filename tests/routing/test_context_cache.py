"""The context cache against cases worked out by hand: LRU, time to live, filling of slots.

A case is a list of forwards of one row. Keys are small numbers; token i proposes expert i, so
that the expert which a hit returns tells whose decision the slot stores.
"""

from __future__ import annotations

import pytest
import torch

from var_moe.routing.context_cache import ContextCache
from var_moe.routing.lru import Clock, WallClock

NONE = -1  # no hit


class SetClock(Clock):
    """Stands still until told."""

    ticks_per_second = 10
    step = 0

    now = 0

    def advance(self, tokens: int) -> int:
        return self.now


class Cache:
    """A `ContextCache` driven token by token; remembers how many tokens it has seen."""

    def __init__(self, *, size: int = 10, ttl: float = 60, clock: Clock | None = None) -> None:
        self.cache = ContextCache(size=size, ttl_seconds=ttl, clock=clock or Clock())
        self.seen = 0

    def begin(
        self,
        keys: list[int],
        *,
        looks_only: tuple[int, ...] = (),
        padding: tuple[int, ...] = (),
        document: int | None = None,
    ) -> None:
        positions = range(len(keys))
        valid = [position not in padding for position in positions]
        counted = [valid[position] and position not in looks_only for position in positions]
        self.cache.begin(
            torch.tensor([keys]),
            torch.tensor([valid]),
            torch.tensor([counted]),
            None if document is None else [document],
        )
        self.first, self.seen = self.seen, self.seen + len(keys)

    def layer(self, layer: int = 0, *, refused: tuple[int, ...] = ()) -> list[int]:
        """Whose decision each token hits; positions in ``refused`` are not admitted."""
        tokens = self.seen - self.first
        index = torch.arange(self.first, self.seen)[:, None]
        admit = torch.tensor([position not in refused for position in range(tokens)])
        hits = self.cache.layer(layer, index, index / 8, admit)
        assert (hits.index[hits.hit] >= 0).all()
        assert torch.equal(hits.weight[hits.hit], hits.index[hits.hit] / 8)
        return torch.where(hits.hit, hits.index[:, 0], NONE).tolist()

    def forward(self, keys: list[int], **options: object) -> list[int]:
        self.begin(keys, **options)  # type: ignore[arg-type]
        return self.layer()


def test_a_key_met_before_hits_within_and_across_forwards() -> None:
    cache = Cache()
    assert cache.forward([7, 8, 7]) == [NONE, NONE, 0]
    assert cache.forward([8, 7, 9]) == [1, 0, NONE]
    assert len(cache.cache) == 3


def test_a_slot_keeps_what_filled_it_first() -> None:
    cache = Cache()
    assert cache.forward([7]) == [NONE]
    assert cache.forward([7]) == [0]
    assert cache.forward([8, 7]) == [NONE, 0]
    assert cache.forward([7]) == [0]


def test_least_recently_met_key_is_evicted() -> None:
    cache = Cache(size=2)
    # 9 pushes out 8, since 7 was met after it.
    assert cache.forward([7, 8, 7, 9]) == [NONE, NONE, 0, NONE]
    assert cache.forward([7]) == [0]
    assert cache.forward([9]) == [3]
    assert cache.forward([8]) == [NONE]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_size_is_the_number_of_keys_held(size: int) -> None:
    cache = Cache(size=size)
    assert cache.forward([1, 2, 3]) == [NONE] * 3
    assert len(cache.cache) == size
    assert cache.forward([4 - size]) == [3 - size]  # the oldest of those that fit


def test_eviction_clears_the_slots_also_within_a_forward() -> None:
    cache = Cache(size=1)
    assert cache.forward([7, 8, 7, 7]) == [NONE, NONE, NONE, 2]
    assert cache.forward([8, 7]) == [NONE, NONE]
    assert cache.forward([7]) == [5]


def test_a_row_of_storage_passes_empty_to_its_next_key() -> None:
    cache = Cache(size=1)
    assert cache.forward([7]) == [NONE]
    cache.begin([8])
    assert cache.layer(refused=(0,)) == [NONE]
    assert cache.forward([8]) == [NONE]  # nothing of 7 is left
    assert cache.forward([8]) == [2]


def test_an_evicted_entry_does_not_write_into_its_successors_row() -> None:
    cache = Cache(size=2)
    assert cache.forward([2, 1]) == [NONE, NONE]
    # 3 takes the place of 2; 1 is met once more, and 4 takes its place.
    assert cache.forward([3, 1, 3, 4]) == [NONE, 1, 2, NONE]
    assert cache.forward([3, 4]) == [2, 5]


def test_size_zero_never_hits() -> None:
    cache = Cache(size=0)
    assert cache.forward([7, 7, 7]) == [NONE] * 3
    assert cache.forward([7, 7]) == [NONE] * 2
    assert len(cache.cache) == 0


def test_an_entry_lives_for_its_ticks_and_hits_do_not_renew_it() -> None:
    cache = Cache(ttl=0.003)  # three tokens
    # Born at tick 0; hit at 1 and 2; gone at 3, where it is born again; hit at 4 and 5.
    assert cache.forward([7, 7, 7, 7, 7, 7, 7]) == [NONE, 0, 0, NONE, 3, 3, NONE]


def test_time_goes_on_over_forwards_and_keys() -> None:
    cache = Cache(ttl=0.003)
    assert cache.forward([7, 8]) == [NONE, NONE]
    assert cache.forward([7]) == [0]  # tick 2
    assert cache.forward([8]) == [1]  # tick 3
    assert cache.forward([7, 8]) == [NONE, NONE]  # ticks 4 and 5


def test_refill_after_expiry_takes_the_new_decision() -> None:
    cache = Cache(ttl=0.002)
    assert cache.forward([7]) == [NONE]
    assert cache.forward([8, 7]) == [NONE, NONE]  # expired at tick 2, filled anew
    assert cache.forward([7]) == [2]


def test_an_expired_entry_keeps_its_place_until_met() -> None:
    cache = Cache(size=2, ttl=0.002)
    cache.forward([7, 8, 8, 8])  # 7 has expired, 8 was renewed at tick 3
    assert len(cache.cache) == 2
    assert cache.forward([9]) == [NONE]  # evicts 7, not 8
    assert cache.forward([8]) == [NONE]  # tick 5: expired
    assert cache.forward([9]) == [NONE]  # tick 6: expired


def test_meeting_an_expired_entry_makes_it_the_most_recent() -> None:
    cache = Cache(size=2, ttl=0.003)
    # 7 is born again at tick 3, so that 9 evicts 8.
    assert cache.forward([7, 8, 8, 7, 9]) == [NONE, NONE, 1, NONE, NONE]
    assert cache.forward([7]) == [3]
    assert cache.forward([8]) == [NONE]


def test_the_first_admitted_occurrence_fills() -> None:
    cache = Cache()
    cache.begin([7, 7, 7, 7])
    assert cache.layer(refused=(0,)) == [NONE, NONE, 1, 1]
    cache.begin([8, 8])
    assert cache.layer(refused=(0, 1)) == [NONE, NONE]
    assert cache.forward([8, 8, 7]) == [NONE, 6, 1]


def test_layers_have_slots_of_their_own_and_share_the_keys() -> None:
    cache = Cache(size=1)
    cache.begin([7, 7])
    assert cache.layer(0) == [NONE, 0]
    assert cache.layer(1, refused=(0,)) == [NONE, NONE]
    cache.begin([7])
    assert cache.layer(0) == [0]
    assert cache.layer(1) == [1]
    cache.begin([8, 7])  # evicts 7 in both layers
    assert cache.layer(0) == [NONE, NONE]
    assert cache.layer(1) == [NONE, NONE]


def test_padding_takes_no_part() -> None:
    cache = Cache(size=1, ttl=0.003)
    cache.begin([7, 8, 8, 8, 7, 7], padding=(1, 2, 3))
    assert cache.layer() == [NONE, NONE, NONE, NONE, 0, 0]  # ticks 0, 1, 2
    assert cache.forward([7]) == [NONE]  # tick 3


def test_time_goes_on_across_padding_in_a_row() -> None:
    expiring = Cache(ttl=0.003).forward([7, 0, 8, 0, 9, 7], padding=(1, 3))
    assert expiring == [NONE] * 6  # the second 7 is the row's fourth token, three ticks later
    assert Cache(ttl=0.003).forward([7, 0, 8, 7], padding=(1,)) == [NONE, NONE, NONE, 0]


def test_looking_up_neither_inserts_nor_refreshes_nor_fills_nor_ticks() -> None:
    cache = Cache(size=2, ttl=0.004)
    cache.begin([7, 8, 7, 9, 9, 9], looks_only=(2, 3, 4, 5))
    assert cache.layer() == [NONE, NONE, 0, NONE, NONE, NONE]
    assert len(cache.cache) == 2
    # Ticks 2 and 3: 9 evicts 7, which looking up did not refresh.
    assert cache.forward([9, 8]) == [NONE, 1]
    cache.begin([10])
    assert cache.layer(refused=(0,)) == [NONE]
    cache.begin([10, 10], looks_only=(0,))
    assert cache.layer() == [NONE, NONE]
    assert cache.forward([10]) == [10]


def test_looking_up_an_expired_entry_finds_nothing_and_leaves_it() -> None:
    cache = Cache(ttl=0.002)
    cache.forward([7, 8])
    cache.begin([7, 8], looks_only=(0, 1))
    assert cache.layer() == [NONE, 1]  # both at tick 2
    assert cache.forward([7, 7]) == [NONE, 4]


def test_each_document_has_its_own_keys_and_time() -> None:
    clock = Clock()
    cache = Cache(ttl=0.003, clock=clock)
    assert cache.forward([7, 7], document=1) == [NONE, 0]  # its ticks 0 and 1
    assert cache.forward([7, 7], document=2) == [NONE, 2]
    assert cache.forward([7, 7], document=1) == [0, NONE]  # ticks 2 and 3
    assert clock.advance(0) == 0


def test_a_document_without_number_ends_with_its_forward() -> None:
    cache = Cache()
    assert cache.forward([7, 7], document=-1) == [NONE, 0]
    assert len(cache.cache) == 0
    assert cache.forward([7, 7], document=-1) == [NONE, 2]


def test_size_holds_for_each_document() -> None:
    cache = Cache(size=1)
    for document, owner in ((1, 0), (2, 1), (3, 2)):
        assert cache.forward([7], document=document) == [NONE]
        assert owner == cache.seen - 1
    assert [cache.forward([7], document=n) for n in (1, 2, 3)] == [[0], [1], [2]]


def test_only_the_latest_documents_are_kept() -> None:
    cache = Cache()
    for document in range(40):
        cache.forward([7], document=document)
    assert len(cache.cache) == 32
    assert cache.forward([7], document=39) == [39]
    assert cache.forward([7], document=7) == [NONE]  # 0 to 7 went
    cache.forward(list(range(5)), document=50)
    assert cache.forward([4], document=50) == [46]


def test_rows_of_a_batch_keep_to_their_documents() -> None:
    cache = ContextCache(size=4, ttl_seconds=60, clock=Clock())
    real = torch.ones((3, 2), dtype=torch.bool)
    cache.begin(torch.tensor([[7, 8], [7, 8], [7, 8]]), real, real, [1, 1, 2])
    index = torch.arange(6)[:, None]
    hits = cache.layer(0, index, index / 8, torch.ones(6, dtype=torch.bool))
    assert hits.hit.tolist() == [False, False, True, True, False, False]
    assert hits.index[hits.hit, 0].tolist() == [0, 1]


def test_clear_forgets_keys_slots_and_time() -> None:
    clock = Clock()
    cache = Cache(ttl=0.003, clock=clock)
    cache.forward([7, 8])
    cache.cache.clear()
    assert len(cache.cache) == clock.advance(0) == 0
    assert cache.forward([7, 7, 7, 7]) == [NONE, 2, 2, NONE]


def test_storage_grows_with_the_keys_that_are_used() -> None:
    cache = Cache(size=300)
    for start in range(0, 300, 50):
        assert cache.forward(list(range(start, start + 50))) == [NONE] * 50
    assert cache.forward(list(range(300))) == list(range(300))


def test_an_injected_clock_decides_age() -> None:
    clock = SetClock()
    cache = Cache(ttl=2, clock=clock)  # 20 of this clock's ticks
    assert cache.forward([7] * 30) == [NONE] + [0] * 29  # all at one moment
    clock.now = 19
    assert cache.forward([7]) == [0]
    clock.now = 20
    assert cache.forward([7]) == [NONE]


def test_wall_clock_goes_forward_in_nanoseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = WallClock()
    assert clock.ticks_per_second == 10**9
    assert clock.advance(3) <= clock.advance(3)
    cache = Cache(ttl=0.5, clock=clock)
    moments = iter([10**9, 10**9 + 499_999_999, 10**9 + 500_000_000])
    monkeypatch.setattr("time.monotonic_ns", lambda: next(moments))
    assert [cache.forward([7]) for _ in range(3)] == [[NONE], [0], [NONE]]


def test_a_layer_before_any_forward_is_an_error() -> None:
    cache = ContextCache(size=1, ttl_seconds=1, clock=Clock())
    with pytest.raises(RuntimeError, match="before begin"):
        cache.layer(0, torch.zeros((1, 1)), torch.zeros((1, 1)), torch.ones(1))
