"""What `routed` is given: a model whose forwards it can follow, and what is to run in it."""

from __future__ import annotations

from typing import Any

from var_moe.errors import UsageError
from var_moe.execution.dispatch import experts_shape
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.guard import Guard
from var_moe.routing.shapes import check_model


def check_given(model: Any, policy: Any, backend: Any, guard: Any) -> None:
    """Refuse what is none of these, before anything is changed.

    Raises:
        UsageError: names the argument, what was given, and what to give.
    """
    kinds = {
        "model": (
            hasattr(model, "get_experts_implementation"),
            "a transformers model, or what load_model returned",
        ),
        "policy": (
            isinstance(policy, RoutingPolicy),
            "one that make_policy returned, or what `var-moe export` wrote",
        ),
        "backend": (
            isinstance(backend, str) or callable(backend),
            'the name of a backend, such as "auto"',
        ),
        "guard": (
            guard is None or isinstance(guard, Guard) or callable(getattr(guard, "see", None)),
            "one that Guard.load or calibrate_guard returned",
        ),
    }
    given = {"model": model, "policy": policy, "backend": backend, "guard": guard}
    for name, (right, expected) in kinds.items():
        if not right:
            found = given[name]
            kind = found.__name__ if isinstance(found, type) else type(found).__name__
            raise UsageError(f"routed(...): {name} is {kind}: expected {expected}")


def check_sizes(model: Any, policy: RoutingPolicy) -> None:
    """Refuse what was calibrated on a model of other sizes.

    Raises:
        UsageError: names the size.
    """
    if policy.compensation is not None:
        policy.compensation.check(**experts_shape(model))
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    check_model(policy, {**experts_shape(model), "vocabulary": vocabulary})


def unwrapped(model: Any) -> tuple[Any, list[Any]]:
    """The transformers model, and all modules whose call is its forward.

    A `PeftModel` runs that model's forward without calling it, and its `generate` calls it.

    Raises:
        UsageError: an adapter puts tokens of its own into the forward.
    """
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model, [model]
    if model.active_peft_config.is_prompt_learning:
        raise UsageError(
            f"adapter {model.active_peft_config.peft_type.value} adds virtual tokens, whose ids "
            "routed(...) cannot know; expected an adapter of weights, such as LoRA"
        )
    inner = model.get_base_model()
    return inner, [model, inner]
