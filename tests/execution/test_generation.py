"""Generating with a KV cache decides as scoring the finished text alone would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from families import find_families, tiny_model
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.models.loading import load_model
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.var import RoutingTable, VARPolicy

MODULES, SLOW = ("mixtral", "gpt_oss"), ("olmoe", "qwen3_moe", "demo")
PAD, END = 0, 7
LETTERS = 14  # prompts are made of few ids, so that contexts repeat

Row = dict[int, list[tuple[int, tuple[int, ...], tuple[float, ...]]]]


@dataclass(frozen=True)
class Decided:
    """A forward's tokens and what was decided for them, layer by layer."""

    batch: ForwardContext
    layers: dict[int, Routing] = field(default_factory=dict)


class Recorder(VARPolicy):
    """VAR that remembers its decisions."""

    forwards: list[Decided]

    def begin(self, context: ForwardContext) -> None:
        super().begin(context)
        self.forwards.append(Decided(context))

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        routing = super().route(context, layer, index, weight)
        self.forwards[-1].layers[layer] = routing
        return routing

    def rows(self) -> list[Row]:
        """Per row of the batch and layer, the decisions of its tokens in order."""
        rows: list[Row] = [{} for _ in self.forwards[0].batch.document]
        for forward in self.forwards:
            shape = forward.batch.ids.shape
            for layer, routing in forward.layers.items():
                for number, row in enumerate(rows):
                    for place in forward.batch.valid[number].nonzero().flatten().tolist():
                        at = number * shape[1] + place
                        kept = routing.index[at] >= 0
                        row.setdefault(layer, []).append(
                            (
                                int(routing.tier[at]),
                                tuple(routing.index[at].tolist()),
                                tuple((routing.weight[at] * kept).tolist()),
                            )
                        )
        return rows


def recorder(model: Any, *, scope: str = "document", **settings: Any) -> Recorder:
    """VAR with a table that puts a third of the ids on the fast path."""
    top_k = getattr(model.config, "num_experts_per_tok", 2)
    experts = getattr(model.config, "num_local_experts", None) or model.config.num_experts
    layers, lead = len(experts_modules(model)), (top_k + 1) // 2
    words = model.config.vocab_size
    dice = torch.Generator().manual_seed(5)
    table = RoutingTable(
        count=torch.full((layers, words), 100.0, dtype=torch.float64),
        entropy=torch.rand((layers, words), generator=dice, dtype=torch.float64) * 1.5,
        index=torch.rand((layers, words, experts), generator=dice).argsort(dim=2)[..., :lead],
        weight=torch.rand((layers, words, lead), generator=dice),
    )
    defaults: dict[str, Any] = {
        "frequency_threshold": 10,
        "entropy_threshold": 0.5,
        "confidence_threshold": 0.55,
        "cache_size": 12,
        "cache_ttl_seconds": 0.03,  # of virtual time: 30 tokens
        "context_window_size": 3,
        "residuals": False,
    }
    config = VARConfig(**(defaults | settings), cache_scope=scope)
    policy = Recorder(config, table)
    policy.forwards = []
    return policy


@pytest.fixture(
    scope="module",
    params=[*MODULES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "demo":
        return load_model("demo", dtype="float32").model
    family = next(f for f in find_families() if f.module == request.param)
    return tiny_model(family)


def prompts(lengths: tuple[int, ...], seed: int = 4) -> dict[str, Tensor]:
    """Left-padded prompts; contexts repeat within each."""
    dice = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        words = torch.randint(8, LETTERS, (length // 2 + 1,), generator=dice).repeat(2)
        ids[row, -length:] = words[:length]
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: Any, text: list[int], policy: Recorder) -> Row:
    """Decisions when one text is scored alone from an empty cache."""
    policy.reset()
    policy.forwards = []
    with routed(model, policy, backend="sorted"), torch.inference_mode():
        model(input_ids=torch.tensor([text]), use_cache=False)
    return policy.rows()[0]


def text_of(row: Tensor, prompt: int, mask: Tensor) -> list[int]:
    """A finished row without padding, up to its end token."""
    generated = row[prompt:].tolist()
    if END in generated:
        generated = generated[: generated.index(END) + 1]
    return [*row[:prompt][mask.bool()].tolist(), *generated]


def same(got: Row, expected: Row, *, tokens: int, tiers: bool = True) -> None:
    """The first ``tokens`` decisions are equal, weights up to rounding."""
    assert got.keys() == expected.keys()
    for layer, decisions in got.items():
        assert len(decisions) == tokens, layer
        for mine, theirs in zip(decisions, expected[layer][:tokens], strict=True):
            if tiers:
                assert mine[:2] == theirs[:2], layer
                assert mine[2] == pytest.approx(theirs[2], abs=1e-4)


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "verified") for kind in GENERATE), ("greedy", "plain")]
)
def test_generation_decides_as_scoring_the_finished_text(model: Any, kind: str, mode: str) -> None:
    given = prompts((9, 14, 5))
    policy = recorder(model, mode=mode)
    torch.manual_seed(11)
    with routed(model, policy, backend="sorted") as session:
        out = model.generate(
            **given, max_new_tokens=24, eos_token_id=END, pad_token_id=PAD, **GENERATE[kind]
        )
    rows = policy.rows()
    tokens, tiers = session.report().tokens, session.report().tier_counts[0]
    copies = out.shape[0] // 3
    lengths = []
    for number, row in enumerate(rows):
        mask = given["attention_mask"][number // copies]
        text = text_of(out[number], 14, mask)
        lengths.append(len(next(iter(row.values()))))
        # The last token is only fed when other rows go on.
        assert len(text) - 1 <= lengths[-1] <= len(text)
        same(row, alone(model, text, policy), tokens=lengths[-1])
    assert tokens == sum(lengths)
    assert min(tiers) > 0, "the case should take all three ways"


def test_an_end_token_in_the_prompt_ends_nothing(model: Any) -> None:
    """As where texts begin with the token that ends them; also when the prompt comes in parts."""
    ids = prompts((12,))["input_ids"]
    ids[0, 0] = ids[0, 6] = END
    policy = recorder(model)
    with routed(model, policy):
        out = model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=END, prefill_chunk_size=4
        )
    (row,) = policy.rows()
    same(row, alone(model, out[0].tolist(), policy), tokens=out.shape[1] - 1)


def test_the_clock_of_a_row_is_its_own(model: Any) -> None:
    """A time to live that rows of a batch together use up three times as fast."""
    given = prompts((12, 12, 12))
    policy = recorder(model, cache_ttl_seconds=0.012, entropy_threshold=0.0)
    with routed(model, policy):
        out = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=END)
    for number, row in enumerate(policy.rows()):
        text = text_of(out[number], 12, given["attention_mask"][number])
        same(row, alone(model, text, policy), tokens=len(next(iter(row.values()))))


def test_a_shared_cache_changes_no_fast_decision(model: Any) -> None:
    given = prompts((9, 14))
    policy = recorder(model, scope="shared")
    with routed(model, policy):
        out = model.generate(**given, max_new_tokens=10, do_sample=False, eos_token_id=END)
    rows = policy.rows()
    for number, row in enumerate(rows):
        text = text_of(out[number], 14, given["attention_mask"][number])
        expected = alone(model, text, policy)
        for layer, decisions in row.items():
            mine = [tier == Tier.FAST for tier, *_ in decisions]
            assert mine == [tier == Tier.FAST for tier, *_ in expected[layer][: len(mine)]]


def test_beams_keep_their_contexts_and_leave_nothing_in_the_cache(model: Any) -> None:
    """With a cache that a text has filled; then the beams' text is scored from an equal one."""
    given = prompts((6, 11))
    settings: dict[str, Any] = {"scope": "shared", "cache_ttl_seconds": 60, "cache_size": 500}
    policy, filling = recorder(model, **settings), torch.randint(8, LETTERS, (1, 60))
    with routed(model, policy), torch.inference_mode():
        model(input_ids=filling, use_cache=False)
        keys = len(policy.cache)
        policy.forwards = []
        out = model.generate(
            **given, max_new_tokens=10, num_beams=3, eos_token_id=END, return_dict_in_generate=True
        )
        assert len(policy.cache) == keys > 10
    steps = policy.forwards
    assert all(not step.batch.inserting for step in steps)
    for number in range(2):
        text = text_of(out.sequences[number], 11, given["attention_mask"][number])
        expected = recorder(model, **settings)
        with routed(model, expected) as session, torch.inference_mode():
            model(input_ids=filling, use_cache=False)
            expected.forwards = []
            ids = torch.tensor([text])
            looks = ForwardContext.of(ids)
            session.announce(
                ForwardContext(ids, looks.valid, looks.counted, document=(5,), inserting=False)
            )
            model(input_ids=ids, use_cache=False)
        theirs = expected.rows()[0]
        prompt = int(given["attention_mask"][number].sum())
        generated = len(text) - prompt
        # The winner's way back through the beams: row of each step.
        beams = out.beam_indices[number][: len(steps)].tolist()
        for step in range(1, min(generated, len(steps))):
            # beam_indices[t] is the beam whose forward gave token t.
            row, decided = beams[step], steps[step]
            assert row >= 0
            for layer, routing in decided.layers.items():
                tier, index, _ = theirs[layer][prompt + step - 1]
                assert int(routing.tier[row]) == tier
                assert tuple(routing.index[row].tolist()) == index


def test_several_calls_and_a_cache_of_the_users_own(model: Any) -> None:
    from transformers import DynamicCache

    policy = recorder(model)
    first = prompts((10,))["input_ids"]
    with routed(model, policy):
        cache = DynamicCache(config=model.config)
        options = {"do_sample": False, "max_new_tokens": 6, "past_key_values": cache}
        half = model.generate(first, **options, eos_token_id=None)
        before = policy.rows()
        same_text, policy.forwards = policy.forwards, []
        model.generate(first, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert policy.rows() == before  # a text of its own: it met an empty cache too
        policy.forwards = same_text
        more = torch.cat((half, torch.tensor([[9, 10, 9, 10]])), dim=1)
        whole = model.generate(more, **options, eos_token_id=None)
    text = whole[0].tolist()
    same(policy.rows()[0], alone(model, text, policy), tokens=len(text) - 1)


def test_a_loop_of_the_users_own(model: Any) -> None:
    policy = recorder(model)
    ids = prompts((10,))["input_ids"]
    text = ids[0].tolist()
    with routed(model, policy), torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        for token in (9, 10, 11, 9, 10, 11):
            text.append(token)
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
    same(policy.rows()[0], alone(model, text, policy), tokens=len(text))


def test_scoring_in_inference_mode_and_then_generating(model: Any) -> None:
    policy = recorder(model, scope="shared")
    ids = prompts((10,))["input_ids"]
    with routed(model, policy):
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    assert len(policy.forwards) == 5


def test_a_cache_that_was_filled_elsewhere_is_refused(model: Any) -> None:
    ids = prompts((10,))["input_ids"]
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with (
            routed(model, recorder(model)),
            pytest.raises(UsageError, match=r"holds 10 tokens, of which .* knows 0 "),
        ):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_reset_forgets_texts_and_cache(model: Any) -> None:
    ids = prompts((10,))["input_ids"]
    policy = recorder(model, scope="shared")
    with routed(model, policy) as session, torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        assert len(policy.cache) > 0
        session.reset()
        assert len(policy.cache) == 0
        with pytest.raises(UsageError, match="knows 0 "):
            model(input_ids=ids[:, :1], past_key_values=out.past_key_values)


def test_assisted_generation_is_refused(model: Any) -> None:
    ids = prompts((10,))["input_ids"]
    with (
        routed(model, recorder(model)),
        pytest.raises(UsageError, match="assisted generation is not supported"),
    ):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_leaving_takes_the_listeners_away(model: Any) -> None:
    before = set(vars(model))
    with routed(model, recorder(model)):
        pass
    assert set(vars(model)) == before
    assert "generate" not in vars(model)


def test_keep_all_generates_what_the_model_does(model: Any) -> None:
    from var_moe.routing.simple import NativePolicy

    given = prompts((9, 14, 5))
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
    expected = model.generate(**given, **options)
    with routed(model, NativePolicy(), backend="grouped_mm"):
        assert torch.equal(model.generate(**given, **options), expected)


@pytest.mark.parametrize("positional", [False, True])
def test_beside_a_whole_configuration_generate_gets_no_argument(model, positional, monkeypatch):
    """transformers wants one or the other, and says so."""
    seen: list[Any] = []

    def generate(inputs: Tensor, generation_config: Any = None, **kwargs: Any) -> None:
        seen.append((generation_config, kwargs))

    monkeypatch.setattr(model, "generate", generate)
    own, ids = GenerationConfig(max_new_tokens=3), prompts((5,))["input_ids"]
    with routed(model, recorder(model)):
        if positional:
            model.generate(ids, own)
        else:
            model.generate(ids, generation_config=own)
        model.generate(ids, max_new_tokens=3)
    (given, beside), (none, alone) = seen
    assert (given.max_new_tokens, given.disable_compile, beside) == (3, True, {})
    assert not own.disable_compile
    assert (none, alone) == (None, {"max_new_tokens": 3, "disable_compile": True})
