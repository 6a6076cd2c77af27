"""Who calls the model inside `routed`: several threads, a part of it, an adapter around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from contract import DropLastPair, logits
from torch import Tensor

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.execution.backends import packed as packed_experts
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.simple import NativePolicy, TopPPolicy
from var_moe.routing.var import RoutingTable, VARPolicy

THREADS, CALLS = 4, 2


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


def var(model: Any) -> VARPolicy:
    layers, words, experts = len(experts_modules(model)), 300, 8
    dice = torch.Generator().manual_seed(5)
    table = RoutingTable(
        count=torch.full((layers, words), 100.0, dtype=torch.float64),
        entropy=torch.rand((layers, words), generator=dice, dtype=torch.float64) * 1.5,
        index=torch.rand((layers, words, experts), generator=dice).argsort(dim=2)[..., :1],
        weight=torch.rand((layers, words, 1), generator=dice),
    )
    config = VARConfig(
        frequency_threshold=10,
        entropy_threshold=0.5,
        confidence_threshold=0.55,
        residuals=False,
        cache_scope="document",
    )
    return VARPolicy(config, table)


POLICIES: dict[str, Callable[[Any], RoutingPolicy]] = {
    "keep all": lambda _model: NativePolicy(),
    "top_p": lambda _model: TopPPolicy(p=0.6),
    "var": var,
}


def prompt(number: int) -> Tensor:
    return torch.randint(8, 300, (1, 5 + number), generator=torch.Generator().manual_seed(number))


def answer(model: Any, number: int) -> list[int]:
    found: Tensor = model.generate(prompt(number), max_new_tokens=8, do_sample=False)
    return found[0].tolist()


@pytest.mark.parametrize(("name", "backend"), [("top_p", "sorted"), ("var", "packed")])
def test_answers_of_several_threads_are_those_of_one(model, name, backend):
    numbers = range(THREADS * CALLS)
    with routed(model, POLICIES[name](model), backend=backend) as session:
        alone = [answer(model, number) for number in numbers]
        tokens = session.report().tokens
        session.reset()
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(lambda number: answer(model, number), numbers))
        assert session.report().tokens == tokens
    assert together == alone


def test_threads_announce_their_own_tokens(model):
    """What a thread announces is for its own next forward, not for whichever comes next."""

    class Seen(NativePolicy):
        documents: tuple[tuple[int, ...], ...] = ()

        def begin(self, context: ForwardContext) -> None:
            self.documents += (context.document,)

    policy, ids = Seen(), prompt(3)
    told = ForwardContext.of(ids)
    with routed(model, policy) as session, torch.inference_mode():
        session.announce(ForwardContext(ids, told.valid, told.counted, document=(77,)))
        other = threading.Thread(target=lambda: logits(model, ids))
        other.start()
        other.join()
        logits(model, ids)
    assert policy.documents[0] != (77,)
    assert policy.documents[1] == (77,)


def test_a_forward_after_the_block_was_left_is_refused(model):
    """A thread's own loop that waits for its turn while another leaves."""
    entered, leaving, errors = threading.Event(), threading.Event(), []

    class Waiting(NativePolicy):
        def begin(self, context: ForwardContext) -> None:
            entered.set()
            assert leaving.wait(60)

    def call() -> None:
        try:
            logits(model, prompt(1))
        except UsageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(2)]
    with routed(model, Waiting()):
        for thread in threads:
            thread.start()
        assert entered.wait(60)
        threading.Timer(0.3, leaving.set).start()
    for thread in threads:
        thread.join(60)
    # The second one either had its turn before the end or is told.
    assert all("wait for the threads" in error for error in errors)
    assert not any(thread.is_alive() for thread in threads)


def test_a_failing_forward_lets_the_next_thread_in(model):
    class FailingOnce(NativePolicy):
        failed = False

        def route(
            self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor
        ) -> Routing:
            if not self.failed:
                self.failed = True
                raise RuntimeError("policy failed")
            return super().route(context, layer, index, weight)

    with routed(model, FailingOnce()), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="policy failed"):
            pool.submit(logits, model, prompt(2)).result(60)
        assert pool.submit(logits, model, prompt(2)).result(60).isfinite().all()
        assert logits(model, prompt(2)).isfinite().all()


def test_a_thread_that_ends_in_a_forward_lets_the_next_one_in(model):
    """SystemExit ends a thread without a word, and torch runs no hook for it."""

    class Ending(NativePolicy):
        def route(
            self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor
        ) -> Routing:
            if threading.current_thread() is ending:
                raise SystemExit
            return super().route(context, layer, index, weight)

    ending = threading.Thread(target=logits, args=(model, prompt(2)))
    with routed(model, Ending()), ThreadPoolExecutor(1) as pool:
        ending.start()
        ending.join(60)
        assert pool.submit(logits, model, prompt(2)).result(60).isfinite().all()


@pytest.mark.parametrize("before", ["no forward", "one token", "as many tokens", "interrupted"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_part_of_the_model_is_refused(model, name, before):
    """`model.model(ids)` has the ids of no forward; stale ones would serve without a word."""
    policy, ids = POLICIES[name](model), prompt(4)
    with routed(model, policy) as session, torch.inference_mode():
        if before == "one token":
            model(input_ids=ids[:, :1])
        elif before == "as many tokens":
            model(input_ids=ids.flip(1))
        elif before == "interrupted":
            route, calls = policy.route, []

            def interrupted(*args: Any) -> Routing:
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return route(*args)

            policy.route = interrupted
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=ids)
        with pytest.raises(UsageError, match=r"call the model itself"):
            model.model(input_ids=ids)
        session.reset()
        model(input_ids=ids)
        assert session.report().tokens == ids.numel()


def test_another_thread_may_not_run_a_part_of_the_model_meanwhile(model):
    entered, done = threading.Event(), threading.Event()

    class Waiting(NativePolicy):
        def route(
            self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor
        ) -> Routing:
            entered.set()
            assert done.wait(60)
            return super().route(context, layer, index, weight)

    with routed(model, Waiting()), ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model, prompt(4))
        assert entered.wait(60)
        with torch.inference_mode(), pytest.raises(UsageError, match="call the model itself"):
            model.model(input_ids=prompt(4))
        done.set()
        assert running.result(60).isfinite().all()


def test_a_policy_serves_one_model_at_a_time(model, make_tiny_mixtral):
    policy = DropLastPair(layer=0)
    with (
        routed(model, policy),
        pytest.raises(UsageError, match="in use by another running"),
        routed(make_tiny_mixtral(), policy),
    ):
        pass
    with routed(model, policy):
        logits(model, prompt(2))


def test_a_cache_that_was_cropped_is_told_apart_from_an_unseen_one(model):
    ids = prompt(6)
    with routed(model, var(model)), torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-7)  # a negative number removes so many, in every version
        with pytest.raises(UsageError, match=r"holds 4 tokens, of which .* knows 11 .*cropped"):
            model(input_ids=ids[:, 4:5], past_key_values=cache)


def test_policies_that_do_not_look_back_take_any_cache(model):
    """Cropped inside the block, or filled before it: no decision depends on what is in it."""
    ids = prompt(6)

    def continued(session: Any = None) -> list[Tensor]:
        out = []
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            cache.crop(-7)  # a negative number removes so many, in every version
            for token in (9, 10):
                out.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits)
        return out

    expected = continued()
    with torch.inference_mode():
        filled = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with routed(model, NativePolicy(), backend="grouped_mm"), torch.inference_mode():
        inside = continued()
        first = model(input_ids=torch.tensor([[9]]), past_key_values=filled).logits
    for mine, theirs in zip(inside, expected, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(first, expected[0])


class TestAdapters:
    """A `PeftModel` calls the model inside it in more than one way."""

    @pytest.fixture(params=["attention", "experts"])
    def adapted(self, request, make_tiny_mixtral):
        peft = pytest.importorskip("peft")
        where: dict[str, Any] = {
            "attention": {"target_modules": ["q_proj"]},
            "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        }[request.param]
        config = peft.LoraConfig(task_type="CAUSAL_LM", **where)
        torch.manual_seed(1)
        model = peft.get_peft_model(make_tiny_mixtral(), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    @pytest.mark.parametrize("backend", ["sorted", "packed", "grouped_mm"])
    def test_its_adapter_counts_however_it_is_called(self, adapted, backend):
        ids = prompt(8)
        expected, generated = (
            logits(adapted, ids),
            adapted.generate(input_ids=ids, max_new_tokens=4),
        )
        with routed(adapted, NativePolicy(), backend=backend) as session:
            torch.testing.assert_close(logits(adapted, ids), expected, rtol=1e-4, atol=1e-4)
            assert session.report().tokens == ids.numel()
            session.reset()
            assert torch.equal(adapted.generate(input_ids=ids, max_new_tokens=4), generated)
            assert session.report().tokens == ids.numel() + 3
            with adapted.disable_adapter():
                without = logits(adapted, ids)
        assert (without - expected).abs().max() > 0.01
        with adapted.disable_adapter():
            torch.testing.assert_close(without, logits(adapted, ids), rtol=1e-4, atol=1e-4)

    def test_an_adapter_may_change_inside_the_block(self, adapted):
        """Weights that an adapter makes anew may lie where those before lay."""
        ids, found = prompt(8), []
        tunable = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        with routed(adapted, NativePolicy(), backend="packed"):
            for factor in (1.0, 0.5, -3.0):
                for parameter in tunable:
                    parameter.data.mul_(factor)
                found.append(logits(adapted, ids))
        expected = []
        for factor in (1 / -1.5, 0.5, -3.0):
            for parameter in tunable:
                parameter.data.mul_(factor)
            expected.append(logits(adapted, ids))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_experts_that_an_adapter_makes_anew_are_not_packed(self, adapted, monkeypatch):
        """Each forward would lay all of them out again."""
        packed: list[int] = []
        pack = packed_experts._pack
        monkeypatch.setattr(packed_experts, "_pack", lambda m, n: packed.append(n) or pack(m, n))
        on_experts = any(
            "experts" in name and "lora" in name for name, _ in adapted.named_modules()
        )
        with routed(adapted, NativePolicy(), backend="packed"):
            logits(adapted, prompt(8))
        assert bool(packed) != on_experts

    def test_virtual_tokens_are_refused(self, make_tiny_mixtral):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(make_tiny_mixtral(), config)
        with pytest.raises(UsageError, match="PROMPT_TUNING"), routed(model, NativePolicy()):
            pass
