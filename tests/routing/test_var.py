"""VARPolicy against decisions worked out by hand, for what each mode runs and with what weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from routing_streams import Table, dense_table

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.var import VARPolicy

FAST, CACHED, LEARNED = (int(tier) for tier in (Tier.FAST, Tier.CACHED, Tier.LEARNED))
PLAIN = VARConfig(mode="plain", context_window_size=1, confidence_threshold=0.75)
VERIFIED = replace(PLAIN, mode="verified")
KNOWN, SEEN_TOO_RARELY = 60, 40
VOCABULARY = 10

Choice = tuple[list[int], list[float]]

SURE: Choice = ([5, 2], [0.125, 0.375])  # expert 2 leads with 0.75 of a sum of 0.5
UNSURE: Choice = ([5, 2], [0.5, 0.25])  # expert 5 leads with 0.67 of a sum of 0.75
OTHER: Choice = ([7, 1], [0.75, 0.25])  # expert 7 leads with 0.75 of a sum of 1


def policy(config: VARConfig, table: Table | None = None, top_k: int = 2) -> VARPolicy:
    config = replace(config, residuals=False)
    return VARPolicy(config, dense_table(table or {}, 1, VOCABULARY, (top_k + 1) // 2))


def known(*experts: tuple[int, float], token: int = 0) -> Table:
    """A table in which ``token`` is on the fast path."""
    return {(0, token): (KNOWN, 0.1, list(experts))}


def route(var: VARPolicy, ids: list[int], choices: list[Choice]) -> Routing:
    context = ForwardContext.of(torch.tensor([ids]))
    var.begin(context)
    index = torch.tensor([experts for experts, _ in choices])
    weight = torch.tensor([weights for _, weights in choices])
    return var.route(context, 0, index, weight)


def rows(routing: Routing) -> list[tuple[int, list[int], list[float]]]:
    """(tier, slots, weights of the executed slots) per token."""
    return [
        (tier, index, [w for e, w in zip(index, weight, strict=True) if e >= 0])
        for tier, index, weight in zip(
            routing.tier.tolist(), routing.index.tolist(), routing.weight.tolist(), strict=True
        )
    ]


# -- plain -------------------------------------------------------------------------------------


def test_plain_fast_runs_the_tables_expert_unseen() -> None:
    var = policy(PLAIN, known((9, 0.6)))
    assert rows(route(var, [0], [SURE])) == [(FAST, [9, -1], [0.5])]


def test_plain_fast_shares_the_full_sum_by_the_tables_weights() -> None:
    var = policy(PLAIN, known((9, 0.375), (4, 0.125)), top_k=3)
    routing = route(var, [0], [([1, 2, 3], [0.25, 0.25, 0.5])])
    assert rows(routing) == [(FAST, [9, 4, -1], [0.75, 0.25])]


def test_plain_cached_runs_the_stored_expert_with_the_sum_of_now() -> None:
    routing = route(policy(PLAIN), [0, 0], [SURE, OTHER])
    assert rows(routing) == [(LEARNED, [5, 2], [0.125, 0.375]), (CACHED, [2, -1], [1.0])]


def test_plain_cached_shares_the_full_sum_by_the_stored_weights() -> None:
    first: Choice = ([1, 2, 3], [0.125, 0.375, 0.125])  # stores 2 and, by its lower id, 1
    routing = route(policy(PLAIN, top_k=3), [0, 0], [first, ([6, 7, 8], [0.5, 0.25, 0.25])])
    assert rows(routing)[1] == (CACHED, [2, 1, -1], [0.75, 0.25])


def test_plain_learned_is_never_cut() -> None:
    assert rows(route(policy(PLAIN), [0], [SURE])) == [(LEARNED, [5, 2], [0.125, 0.375])]


def test_plain_fast_comes_before_the_cache() -> None:
    var = policy(PLAIN, known((9, 0.6)))
    assert [tier for tier, _, _ in rows(route(var, [0, 0], [SURE, SURE]))] == [FAST, FAST]


@pytest.mark.parametrize("entry", [(SEEN_TOO_RARELY, 0.1), (KNOWN, 0.6), (0, 0.0)])
def test_tokens_rare_or_hard_to_predict_are_not_fast(entry: tuple[int, float]) -> None:
    table: Table = {(0, 0): (*entry, [(2, 0.6)])}
    for config in (PLAIN, VERIFIED):
        assert route(policy(config, table), [0], [UNSURE]).tier.tolist() == [LEARNED]


@pytest.mark.parametrize("config", [PLAIN, VERIFIED], ids=["plain", "verified"])
@pytest.mark.parametrize("choice", [([5], [0.0]), ([5, 2], [0.0, 0.0])], ids=["top1", "top2"])
def test_a_token_without_any_weight_stays_without(config: VARConfig, choice: Choice) -> None:
    """A router that can skip the experts gives such tokens a weight of zero."""
    for table in ({}, known((5, 0.6))):
        routing = route(policy(config, table, top_k=len(choice[0])), [0], [choice])
        assert routing.weight.eq(0).all()


# -- verified ----------------------------------------------------------------------------------


def test_verified_fast_runs_the_routers_own_leading_expert() -> None:
    var = policy(VERIFIED, known((5, 0.6)))
    assert rows(route(var, [0], [UNSURE])) == [(FAST, [5, -1], [0.75])]


def test_verified_fast_is_refused_when_the_tables_first_expert_does_not_lead() -> None:
    var = policy(VERIFIED, known((2, 0.6)))  # among the router's two, but second
    assert rows(route(var, [0], [UNSURE])) == [(LEARNED, [5, 2], [0.5, 0.25])]


def test_a_refused_decision_is_cut_when_it_is_sure_of_itself() -> None:
    var = policy(VERIFIED, known((5, 0.6)))
    assert rows(route(var, [0], [SURE])) == [(LEARNED, [-1, 2], [0.5])]


def test_a_refused_fast_licence_does_not_fall_through_to_the_cache() -> None:
    var = policy(VERIFIED, known((9, 0.6)))
    routing = route(var, [0, 0], [([5, 2], [0.75, 0.25]), ([5, 2], [0.5, 0.25])])
    assert rows(routing)[1] == (LEARNED, [5, 2], [0.5, 0.25])  # its slot holds 5, which leads


def test_one_leading_expert_of_several_is_licence_enough() -> None:
    choice: Choice = ([1, 2, 3], [0.25, 0.25, 0.5])  # 3 leads, then 1; mass 0.75
    config = replace(VERIFIED, confidence_threshold=0.9)
    for first, tier in ((3, FAST), (1, FAST), (2, LEARNED), (9, LEARNED)):
        # The table's second expert gives no licence.
        var = policy(config, known((first, 0.5), (3 if first != 3 else 9, 0.25)), top_k=3)
        executed = {FAST: [1, -1, 3], LEARNED: [1, 2, 3]}[tier]
        assert route(var, [0], [choice]).index.tolist() == [executed]
        assert route(var, [0], [choice]).tier.tolist() == [tier]


def test_verified_cached_cuts_a_decision_that_is_not_sure() -> None:
    stored: Choice = ([2, 5], [0.125, 0.375])
    routing = route(policy(VERIFIED), [0, 0], [stored, UNSURE])
    assert rows(routing) == [(LEARNED, [-1, 5], [0.5]), (CACHED, [5, -1], [0.75])]


def test_verified_cached_is_refused_when_the_stored_expert_does_not_lead() -> None:
    routing = route(policy(VERIFIED), [0, 0, 0], [SURE, UNSURE, OTHER])
    assert rows(routing)[1:] == [(LEARNED, [5, 2], [0.5, 0.25]), (LEARNED, [7, -1], [1.0])]


def test_a_refused_hit_leaves_the_slot_as_it_is() -> None:
    routing = route(policy(VERIFIED), [0, 0, 0], [SURE, OTHER, SURE])
    assert routing.tier.tolist() == [LEARNED, LEARNED, CACHED]


def test_an_unsure_decision_is_not_stored() -> None:
    for config in (PLAIN, VERIFIED):
        routing = route(policy(config), [0, 0], [UNSURE, UNSURE])
        assert rows(routing) == [(LEARNED, [5, 2], [0.5, 0.25])] * 2


def test_top_1_runs_its_one_expert_in_every_tier() -> None:
    choices: list[Choice] = [([3], [0.625]), ([3], [0.375]), ([4], [0.5])]
    var = policy(VERIFIED, known((3, 0.9), token=1), top_k=1)
    routing = route(var, [0, 0, 1], choices)
    assert rows(routing) == [
        (LEARNED, [3], [0.625]),
        (CACHED, [3], [0.375]),
        (LEARNED, [4], [0.5]),
    ]


# -- documents and the cache's life ------------------------------------------------------------


@pytest.mark.parametrize(("scope", "second"), [("shared", CACHED), ("document", LEARNED)])
def test_rows_without_a_number_are_documents_of_their_own(scope: str, second: int) -> None:
    var = policy(replace(VERIFIED, cache_scope=scope))
    for expected in (LEARNED, second):
        assert route(var, [0, 0], [SURE, SURE]).tier.tolist() == [expected, CACHED]


def test_reset_empties_the_cache() -> None:
    var = policy(VERIFIED)
    assert route(var, [0], [SURE]).tier.tolist() == [LEARNED]
    assert route(var, [0], [SURE]).tier.tolist() == [CACHED]
    var.reset()
    assert route(var, [0], [SURE]).tier.tolist() == [LEARNED]


# -- residual means ----------------------------------------------------------------------------


def residual_means(*, by_pair: bool) -> ResidualMeans:
    keys = VOCABULARY**2 if by_pair else VOCABULARY
    table = torch.arange(keys + 1)[:, None] * torch.ones((1, 3))
    table[-1] = 0
    return ResidualMeans(table=(table,), by_pair=by_pair, experts=VOCABULARY)


@pytest.mark.parametrize(
    ("by_pair", "cut_row", "zero_row"), [(True, 2 * VOCABULARY + 5, 100), (False, 2, 10)]
)
def test_residuals_replace_what_is_dropped(by_pair: bool, cut_row: int, zero_row: int) -> None:
    var = VARPolicy(
        VERIFIED, dense_table({}, 1, VOCABULARY, 1), residuals=residual_means(by_pair=by_pair)
    )
    extra = route(var, [0, 1], [SURE, UNSURE]).residual  # the first is cut, the second is not
    assert extra is not None
    assert extra.row.tolist() == [cut_row, zero_row]
    assert extra.scale.tolist()[0] == 0.125
    added = extra.table[extra.row] * extra.scale[:, None]
    assert added.tolist() == [[cut_row * 0.125] * 3, [0.0] * 3]


def test_no_residuals_where_nothing_is_dropped_or_none_are_wanted() -> None:
    means = residual_means(by_pair=False)
    table = dense_table({}, 1, VOCABULARY, 1)
    plain = VARPolicy(PLAIN, table, residuals=means)
    without = VARPolicy(replace(VERIFIED, residuals=False), table, residuals=means)
    assert route(plain, [0], [SURE]).residual is None
    assert route(without, [0], [SURE]).residual is None
    top_1 = VARPolicy(VERIFIED, table, residuals=means)
    assert route(top_1, [0], [([3], [0.5])]).residual is None


def test_residuals_that_are_wanted_must_be_given() -> None:
    with pytest.raises(UsageError, match="give VARPolicy the profile's"):
        VARPolicy(VERIFIED, dense_table({}, 1, VOCABULARY, 1))


# -- what came of the offers -------------------------------------------------------------------


def offers(routing: Routing) -> list[tuple[int, bool]]:
    assert routing.offer is not None
    assert routing.agrees is not None
    assert routing.offer.dtype == torch.uint8
    return list(zip(routing.offer.tolist(), routing.agrees.tolist(), strict=True))


@pytest.mark.parametrize("config", [PLAIN, VERIFIED], ids=["plain", "verified"])
def test_offers_of_the_table(config: VARConfig) -> None:
    """The router puts 2 first, then 7; token 1 is not in the table."""
    var = policy(config, known((2, 0.6)))
    routing = route(var, [0, 0, 1], [SURE, OTHER, UNSURE])
    assert offers(routing) == [(FAST, True), (FAST, False), (LEARNED, False)]
    expected = [FAST, FAST if config.mode == "plain" else LEARNED, LEARNED]
    assert routing.tier.tolist() == expected


@pytest.mark.parametrize("config", [PLAIN, VERIFIED], ids=["plain", "verified"])
def test_offers_of_the_cache(config: VARConfig) -> None:
    """The first decision is stored; the router then agrees, and then does not."""
    routing = route(policy(config), [0, 0, 0], [SURE, SURE, OTHER])
    assert offers(routing) == [(LEARNED, False), (CACHED, True), (CACHED, False)]


def test_documents_are_apart_without_a_shared_cache() -> None:
    assert not policy(VERIFIED).documents_apart
    assert policy(replace(VERIFIED, cache_scope="document")).documents_apart
    assert policy(replace(VERIFIED, cache_size=0)).documents_apart
