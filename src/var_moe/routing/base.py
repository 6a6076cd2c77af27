"""The one extension point for routing: a policy turns the router's decision into a Routing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from typing import Any, Self

from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing

Sweep = Callable[[float], dict[str, Any]]
"""From a strength in [0, 1] to settings of `RoutingPolicy.build`, with ever fewer pairs."""


class RoutingPolicy(ABC):
    """Decides, per layer and token, which of the router's pairs are executed.

    In each forward, ``begin(context)`` is called once, then ``route(context, layer, ...)`` for each
    MoE layer in order. A policy looks at no later token, changes neither the model nor its inputs,
    and keeps no context.
    """

    context_window: int = 0
    """Token ids that a decision depends on, the token's own included; 0: it depends on no ids, and
    on nothing that an earlier forward left."""

    compensation: Compensation | None = None
    """What stands in for the pairs that it drops; see `compensated`."""

    cuts_only: bool = False
    """Whether every decision runs some of the token's first experts, at least one, rescaled to the
    full decision's sum or with a compensation. A policy that does can be tuned by replay."""

    @abstractmethod
    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        """Decide one layer.

        Args:
            context: the forward's tokens, the same for all its layers.
            layer: number of the MoE layer, 0..L-1 (dense layers are not counted).
            index: (T, K) expert ids from the router, in any slot order.
            weight: (T, K) the router's weights for them.
        """

    def begin(self, context: ForwardContext) -> None:  # noqa: B027 - optional by design
        """A forward starts: update what is kept between forwards (a cache)."""

    def see(self, layer: int, hidden: Tensor) -> None:  # noqa: B027 - optional by design
        """See the layer's input (T, D), just before its `route`."""

    def reset(self) -> None:  # noqa: B027 - optional by design
        """Forget everything that earlier forwards left (caches, clocks)."""

    @property
    def ids_before(self) -> int:
        """Ids before a token that its decision depends on."""
        return max(self.context_window - 1, 0)

    @property
    def adds_residual(self) -> bool:
        """Whether something is added in place of the pairs that it drops."""
        return self.compensation is not None

    @property
    def made_for(self) -> Mapping[str, int]:
        """Known sizes of the model that it was calibrated on: ``layers``, ``experts``,
        ``hidden``, ``vocabulary``."""
        return {}

    @property
    def drops_only(self) -> bool:
        """Whether every executed pair is one that the router chose, in its own slot."""
        return True

    @property
    def documents_apart(self) -> bool:
        """Whether what is decided in a document depends on that document alone."""
        return True

    def compensated(self, compensation: Compensation | None) -> Self:
        """The same policy, with ``compensation`` in place of rescaling or residual means.

        Raises:
            UsageError: the policy runs experts that the router did not choose.
        """
        if compensation is not None and not self.drops_only:
            raise UsageError(
                f"{type(self).__name__} runs experts that the router did not choose, which a "
                "compensation can't stand in for; leave it out, or use mode='verified'"
            )
        self.compensation = compensation
        return self

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        """What a tuner may vary, for a model with K = ``top_k`` experts per token.

        Returns:
            Name of a setting of `build` -> ``{"type": "int" | "float", "low", "high",
            "default"}``, with ``"log": True`` for a scale of orders of magnitude; empty where
            there is nothing to vary.
        """
        return {}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        """Sweeps from mild to hard cuts, for comparing policies at equal experts per token.

        A policy with one sweep names it ``""``; empty where there is none.
        """
        return {}

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Named settings that a search measures beside its own candidates."""
        return {}

    @classmethod
    def needed(cls, settings: Mapping[str, Any], needs: Collection[str]) -> tuple[str, ...]:
        """Those of the calibration inputs ``needs`` that these settings use."""
        return tuple(needs)

    @classmethod
    def per_document(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings changed so that a document's decisions depend on that document alone."""
        return dict(settings)

    @classmethod
    def cost_settings(
        cls, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Settings that do all of the policy's work and cut nothing, and those that cut all.

        A cost model is fitted to both. None where there are none: then decisions are timed with
        a compensation only (see `routing.simple.Overhead`).
        """
        return None

    @classmethod
    def build(cls, settings: Mapping[str, Any], calibration: Mapping[str, Any]) -> Self:
        """Make the policy from its settings and what was fitted on calibration text.

        Both by the constructor's names; a UsageError names what is unknown, missing, or out of
        its range.
        """
        cls.check_settings(settings, calibration)
        for name, parameter in signature(cls).parameters.items():
            given = name in settings or name in calibration
            if not given and parameter.default is Parameter.empty:
                raise UsageError(f"{cls.__name__}: setting {name!r} is missing")
        return cls(**settings, **calibration)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], calibrated: Collection[str]) -> None:
        """Raise UsageError unless all are arguments of the constructor beside ``calibrated``."""
        own = [name for name in signature(cls).parameters if name not in calibrated]
        for name in settings:
            if name not in own:
                raise UsageError(
                    f"{cls.__name__}: unknown setting {name!r}; expected {', '.join(own) or 'none'}"
                )


def check_top_k(policy: RoutingPolicy, index: Tensor, top_k: int) -> None:
    """Raise UsageError unless the K of ``index`` (T, K) is the one that was calibrated on."""
    if index.shape[1] != top_k:
        raise UsageError(
            f"{type(policy).__name__}: calibrated for K = {top_k}, the model has "
            f"K = {index.shape[1]}; calibrate on this model"
        )


def check_model(policy: RoutingPolicy, sizes: Mapping[str, int]) -> None:
    """Raise UsageError unless a model of these sizes can be the one that was calibrated on."""
    for what, mine in policy.made_for.items():
        theirs = sizes[what]
        # A tokenizer may have more ids than its model takes.
        if mine < theirs if what == "vocabulary" else mine != theirs:
            raise UsageError(
                f"{type(policy).__name__}: calibrated for {what} = {mine}, the model has {theirs}; "
                "calibrate on this model"
            )
