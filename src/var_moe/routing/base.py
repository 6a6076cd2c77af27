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

Dial = Callable[[float], dict[str, Any]]
"""From a strength in [0, 1] to settings of `RoutingPolicy.build`, with ever fewer pairs."""


class RoutingPolicy(ABC):
    """Decides, per layer and token, which of the router's pairs are executed.

    In each forward, ``begin(context)`` is called once, then ``route(context, layer, ...)`` for each
    MoE layer in order. A policy looks at no future token and changes neither the model nor its
    inputs; the context holds the forward's facts, and is not kept.
    """

    context_window: int = 0
    """Token ids that a decision depends on, the token's own included; 0: it depends on no ids, and
    on nothing that an earlier forward left."""

    @property
    def ids_before(self) -> int:
        """Ids before a token that its decision depends on."""
        return max(self.context_window - 1, 0)

    compensation: Compensation | None = None
    """What stands in for the pairs that it drops; see `compensated`."""

    @property
    def adds_residual(self) -> bool:
        """Whether something is added in place of the pairs that it drops."""
        return self.compensation is not None

    cuts_only: bool = False
    """Whether every decision runs some of the token's first experts, at least one, rescaled to the
    full decision's sum or with a compensation: then a trace tells what it costs, and the policy
    is tuned by replay."""

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
        """A forward starts: what the policy remembers of earlier ones (a cache) moves on."""

    def see(self, layer: int, hidden: Tensor) -> None:  # noqa: B027 - optional by design
        """See the layer's input (T, D), just before its `route`."""

    @property
    def made_for(self) -> Mapping[str, int]:
        """Sizes of the model that it was calibrated on, as far as it knows them: ``layers``,
        ``experts``, ``hidden``, ``vocabulary``."""
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
        """The same policy, with ``compensation`` in place of the experts that it drops.

        It then replaces what the policy itself does about dropped weight (rescaling, residual
        means).

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

    def reset(self) -> None:  # noqa: B027 - optional by design
        """Forget everything that earlier forwards left (caches, clocks)."""

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
    def dials(cls, top_k: int) -> dict[str, Dial]:
        """Ways from mild to hard, for comparing policies at equal experts per token.

        Returns:
            Name -> strength in [0, 1] to settings; executed pairs fall with strength. A policy
            with one knob has one way, named ``""``; empty where there is nothing to turn.
        """
        return {}

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Named settings that a search measures beside its own candidates."""
        return {}

    @classmethod
    def needed(cls, settings: Mapping[str, Any], needs: Collection[str]) -> tuple[str, ...]:
        """Of the calibration inputs that the registry names for the policy, those that these
        settings use."""
        return tuple(needs)

    @classmethod
    def per_document(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings changed so that a document's decisions depend on that document alone."""
        return dict(settings)

    @classmethod
    def milder(
        cls, settings: Mapping[str, Any], strength: float, top_k: int
    ) -> dict[str, Any] | None:
        """Settings that cut ``strength`` times as hard, by the policy's one dial.

        Returns:
            None where the policy has no dial that sets all of its settings.
        """
        dial = cls.dials(top_k).get("")
        if dial is None or len(settings) != 1 or set(dial(0.5)) != set(settings):
            return None
        ((name, value),) = settings.items()
        steps = [step / 1000 for step in range(1001)]
        own = min(steps, key=lambda step: abs(float(dial(step)[name]) - float(value)))
        return dial(strength * own)

    @classmethod
    def cost_settings(
        cls, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Settings with which the policy does all of its work and cuts nothing, and everything.

        A cost model is fitted to both. None where no settings do so: then the policy's decisions
        are timed with a compensation only (see `routing.overhead`).
        """
        return None

    @classmethod
    def build(cls, settings: Mapping[str, Any], calibration: Mapping[str, Any]) -> Self:
        """Make the policy from what a search or a command line holds.

        Args:
            settings: the constructor's own values, by name.
            calibration: what was fitted on calibration text, by the constructor's names.

        Raises:
            UsageError: a setting is unknown or missing, or out of its range.
        """
        cls.check_settings(settings, calibration)
        parameters = signature(cls).parameters
        for name in parameters:
            if (
                name not in (*settings, *calibration)
                and parameters[name].default is Parameter.empty
            ):
                raise UsageError(f"{cls.__name__}: setting {name!r} is missing")
        return cls(**settings, **calibration)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], calibrated: Collection[str]) -> None:
        """Refuse settings that the constructor does not have; ``calibrated`` are not settings.

        Raises:
            UsageError: names the setting, and those that there are.
        """
        own = [name for name in signature(cls).parameters if name not in calibrated]
        for name in settings:
            if name not in own:
                raise UsageError(
                    f"{cls.__name__}: unknown setting {name!r}; expected {', '.join(own) or 'none'}"
                )
