"""A model of the LM Evaluation Harness whose experts run as a policy decides.

``var-moe lm-eval --model var-moe --model_args pretrained=...,var_config=...`` registers it and
hands all words on to the harness, which (as of 0.4.13) finds no models of other packages itself.
In Python, importing this module registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.data.encoding import check_ids
from var_moe.errors import UsageError
from var_moe.execution.backends import open_backend
from var_moe.execution.session import Session, routed
from var_moe.extras import require
from var_moe.models.loading import DEMO_FOLDER, LoadedModel
from var_moe.optimization.candidate import load_candidate
from var_moe.optimization.validation import find_profile
from var_moe.routing.base import RoutingPolicy
from var_moe.serving.folder import HEAD_FILE, load_exported
from var_moe.storage import expanded

require("lm_eval.models.huggingface")

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


@register_model("var-moe")
class VarMoeLM(HFLM):  # type: ignore[misc]
    """The harness' Hugging Face model, with each of its forwards inside `routed`.

    Args:
        pretrained: demo, a local folder, or a Hub id.
        var_config: a folder that `var-moe export` wrote, or its Hub id; or a configuration such as
            ``best_config.json``.
        profile: profile folder, for a configuration that has none beside it.
        compensation: folder of a learned compensation, where it is not the profile's own.
        options: those of `lm_eval.models.huggingface.HFLM`.

    Each forward begins with an empty context cache, and VAR's cache is emptied per document: so
    that no answer depends on the order of the requests.

    Raises:
        UsageError: no such configuration, or it does not fit the model; names what.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        var_config: str | None = None,
        profile: str | None = None,
        compensation: str | None = None,
        **options: Any,
    ) -> None:
        if not var_config:
            raise UsageError(
                "--model_args: var_config is missing; expected a folder of `var-moe export`, its "
                "Hub id, or a configuration (JSON)"
            )
        if pretrained == "demo":
            pretrained = str(DEMO_FOLDER)
            options.setdefault("dtype", "float32")  # stored as float16 to be small
        pretrained, var_config = expanded(pretrained), expanded(var_config)
        profile, compensation = (one and expanded(one) for one in (profile, compensation))
        super().__init__(pretrained=pretrained, **options)
        loaded = LoadedModel.of(self.model, self.tokenizer, name=pretrained)
        self.policy = policy_for(loaded, var_config, profile=profile, compensation=compensation)
        self._var_config = var_config
        self._backend = open_backend("auto", self.model)
        self._tokens = self._pairs = 0.0

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """The harness' own, which it calls for each request before the first forward."""
        ids: list[int] = super().tok_encode(*args, **kwargs)
        check_ids(ids, self.model, self.tokenizer, "a request of the task")
        return ids

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with routed(self.model, self.policy, backend=self._backend) as session:
            session.reset()
            out = super()._model_call(*args, **kwargs)
            self._count(session)
        return out

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with routed(self.model, self.policy, backend=self._backend) as session:
            session.reset()
            out = super()._model_generate(*args, **kwargs)
            self._count(session)
        return out

    def get_model_info(self) -> dict[str, Any]:
        """The harness' own entries, with the configuration and what it executed so far.

        The harness pads rows without saying so: padding counts as tokens here.
        """
        executed = self._pairs / self._tokens if self._tokens else None
        own = {"var_config": self._var_config, "experts_per_token": executed}
        return {**super().get_model_info(), "var_moe": own}

    def _count(self, session: Session) -> None:
        report = session.report()
        self._tokens += report.tokens
        self._pairs += report.tokens * report.experts_per_token


def policy_for(
    loaded: LoadedModel,
    var_config: str,
    *,
    profile: str | None = None,
    compensation: str | None = None,
) -> RoutingPolicy:
    """The policy that ``var_config`` names, for this model; see `VarMoeLM`.

    Raises:
        UsageError: no such configuration, or it does not fit the model; names what.
    """
    path = Path(var_config)
    if path.suffix != ".json":
        return load_exported(var_config, loaded).per_document().policy()
    if path.name == HEAD_FILE:
        raise UsageError(f"{path}: give its folder, {path.parent}")
    candidate = load_candidate(path)
    known = find_profile(path, Path(profile) if profile else None)
    known.check_loaded(loaded)
    if compensation:
        known = known.with_compensation(load_compensation(compensation, loaded))
    return candidate.per_document().make(known)
