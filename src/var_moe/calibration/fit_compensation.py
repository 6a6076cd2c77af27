"""Fitting a compensation on calibration text (see `routing.compensation`).

First layer by layer, by least squares (`fitting.regress`), then by distillation of the whole
model (`fitting.distill`), which costs three times as much per token. Each step cuts decisions at
another tau, so that the result serves a range of experts per token. What is fitted is judged on
held-out calibration documents, at fixed taus; the best state counts, and one that is no better
there than the start is not handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.calibration.checkpoint import Checkpoint
from var_moe.calibration.distill import Distillation, Divergence, Trainable, divergence, forward
from var_moe.calibration.material import Material, schedule
from var_moe.calibration.regress import Regression
from var_moe.config import check_count, check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.execution.dispatch import attach, detach, experts_modules, experts_shape, pair_backend
from var_moe.models.identity import identity
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.storage import sha256_of

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.decision import ForwardContext

log = logging.getLogger(__name__)

DEFAULT_TOKENS, DEFAULT_REGRESS_TOKENS = 400_000, 800_000
COST_SHARE = 0.03
"""What the map may cost, as a share of the multiply-adds that it helps to save."""
KEPT_SHARES = (0.55, 0.8)
"""Experts per token during fitting, as shares of K."""
_SAVE_EVERY = 20  # steps of the layer-wise part
_LOOKS = 12  # evaluations on held-out text in a whole run
_PATIENCE = 4  # of them without an improvement
_REGRESS_RATE, _RATE = 4e-3, 1e-3
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a compensation is fitted.

    Args:
        rank: of the map; None takes the largest multiple of 8 within `COST_SHARE`.
        regress_tokens: of calibration text for the layer-wise part, over as many passes as that
            takes; 0 leaves it out.
        tokens: the same for the distillation.
        tokens_per_batch: padded tokens of a step.
        regress_rate, rate: highest learning rates of Adam.
        seed: draws the start, the order of the text and the taus.

    Raises:
        UsageError: a number is out of its range.
    """

    rank: int | None = None
    regress_tokens: int = DEFAULT_REGRESS_TOKENS
    tokens: int = DEFAULT_TOKENS
    tokens_per_batch: int = 4096
    regress_rate: float = _REGRESS_RATE
    rate: float = _RATE
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("rank", "regress_tokens", "tokens"):
            check_count(name, getattr(self, name), 0)
        check_count("tokens_per_batch", self.tokens_per_batch)
        if not self.tokens and not self.regress_tokens:
            raise UsageError("tokens = regress_tokens = 0: expected one of them above 0")
        for name in ("regress_rate", "rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} = {getattr(self, name)}: expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A fitted compensation and how it came about."""

    compensation: Compensation
    held_out: dict[str, float]  # nats per token: "nothing", "start", "regressed", "fitted"
    curve: list[tuple[int, float]]  # tokens, held-out divergence
    tokens: int
    taus: tuple[float, ...]
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        """For the head of a file."""
        return {
            "rank": self.compensation.rank,
            "held_out_divergence_nats": self.held_out,
            "curve": [{"tokens": t, "held_out_divergence_nats": d} for t, d in self.curve],
            "fitted_tokens": self.tokens,
            "held_out_taus": list(self.taus),
            "stopped": self.stopped,
        }


def affordable_rank(model: Any, top_k: int) -> int:
    """Largest rank, a multiple of 8, within `COST_SHARE` where 0.65 K experts run."""
    module: Any = experts_modules(model)[0][1]
    first = module.gate_up_proj if module.has_gate else module.up_proj
    expert = first[0].numel() + module.down_proj[0].numel()  # multiply-adds per pair
    hidden = experts_shape(model)["hidden"]
    saved = expert * 0.35 * top_k
    return max(8, int(COST_SHARE * saved / (2 * hidden)) // 8 * 8)


def fit_compensation(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    damage: DamageModel,
    taus: Sequence[float],
    start: Compensation,
    settings: FitSettings | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    backend: str = "sorted",
) -> FitResult:
    """Distil the unmodified model into what a damage policy leaves of it.

    Args:
        loaded: the model.
        documents: calibration text; a part is held out.
        damage: which decisions are cut.
        taus: the smallest and the largest tau of a step (see `tau_range`).
        start: what the vectors begin with, such as residual means.
        settings: see `FitSettings`.
        checkpoint: file that a killed run goes on from, and an ended one gives the same again;
            who has saved the result removes it.
        progress: called with what is done, tokens done and in all.
        backend: experts backend.

    Raises:
        UsageError: too little text, or a start of another model.
        VarMoeError: the result is no better than the start on held-out text.
    """
    settings = settings or FitSettings()
    start.check(**experts_shape(loaded.model))
    fit = _Fit(loaded, documents, damage, taus, start, settings, backend)
    before = attach(loaded.model, fit.session)
    asked = [p.requires_grad for p in loaded.model.parameters()]
    try:
        loaded.model.requires_grad_(False)
        with torch.inference_mode(False):
            return fit.run(checkpoint, progress)
    finally:
        for parameter, value in zip(loaded.model.parameters(), asked, strict=True):
            parameter.requires_grad_(value)
        detach(loaded.model, before)


@dataclass
class _State:
    """What a checkpoint holds besides tensors."""

    regress_steps: int = 0
    regress_tokens: int = 0
    regressed: float | None = None  # held-out divergence after the layer-wise part
    steps: int = 0
    tokens: int = 0
    best: float = float("inf")
    since: int = 0  # looks without an improvement
    curve: list[tuple[int, float]] = field(default_factory=list)


class _Fit:
    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[EncodedDocument],
        damage: DamageModel,
        taus: Sequence[float],
        start: Compensation,
        settings: FitSettings,
        backend: str,
    ) -> None:
        self.loaded, self.damage, self.settings, self.start = loaded, damage, settings, start
        self.backend = pair_backend(backend)
        self.session = Distillation(self.backend)
        self.device = torch.device(loaded.device)
        self.low, self.high = min(taus), max(taus)
        self.material = Material(
            documents,
            window=loaded.window,
            tokens_per_batch=settings.tokens_per_batch,
            seed=settings.seed,
        )
        self.looks_taus = tuple(np.geomspace(self.low, self.high, 4)[1:].tolist())
        self.state = _State()

    def run(self, checkpoint: Path | None, progress: Progress | None) -> FitResult:
        settings, state = self.settings, self.state
        rank = settings.rank
        if rank is None:
            rank = affordable_rank(self.loaded.model, self.loaded.top_k)
        held = self.material.held_out_batches()
        trainable = Trainable(
            self.start, rank=rank, scale=self._input_scale(held[0]), seed=settings.seed
        ).to(self.device)
        regression = Regression(self.backend, trainable, rate=settings.regress_rate)
        optimiser = torch.optim.Adam(trainable.parameters(), lr=settings.rate)
        nothing, begun = self._look(held, None), self._look(held, trainable.compensation())
        saved = Checkpoint(checkpoint, key=self._key(rank))
        best = trainable.frozen()
        restored = saved.load(trainable, [regression, optimiser])
        if restored is not None:
            state.__dict__.update(restored[0])
            best = restored[1]

        def save() -> None:
            saved.save(trainable, [regression, optimiser], state.__dict__, best)

        self._regress(regression, save, progress)
        if state.regressed is None:
            state.regressed = self._look(held, trainable.compensation())
            if settings.regress_tokens:
                state.best, best = state.regressed, trainable.frozen()
                save()
        each = max(1, settings.tokens // _LOOKS)
        for batch in self.material.batches(1, lambda: (state.steps, state.tokens), settings.tokens):
            if state.since >= _PATIENCE:
                break  # here already where a killed run had come so far
            self._step(trainable, optimiser, batch)
            if progress:
                progress("distilling", min(state.tokens, settings.tokens), settings.tokens)
            done = state.tokens >= settings.tokens
            if not done and state.tokens // each == len(state.curve):
                continue
            here = self._look(held, trainable.compensation())
            state.curve.append((state.tokens, here))
            state.since += 1
            if here < state.best:
                state.best, state.since, best = here, 0, trainable.frozen()
            save()
        stopped = "the text asked for is used up"
        if state.since >= _PATIENCE:
            stopped = f"no improvement on held-out text in {_PATIENCE} looks"
        worst = min(nothing, begun)
        if not state.best < worst:
            saved.remove()
            raise VarMoeError(
                f"the fitted compensation is no better on held-out text ({state.best:.4f} "
                f"nats per token) than none or the start ({worst:.4f}); nothing was saved; try "
                "more --tokens or a lower --rate"
            )
        return FitResult(
            compensation=best,
            held_out={
                "nothing": nothing,
                "start": begun,
                "regressed": state.regressed,
                "fitted": state.best,
            },
            curve=state.curve,
            tokens=state.regress_tokens + state.tokens,
            taus=self.looks_taus,
            stopped=stopped,
        )

    def _regress(
        self, regression: Regression, save: Callable[[], None], progress: Progress | None
    ) -> None:
        """The layer-wise part, from where the state stands."""
        state, wanted = self.state, self.settings.regress_tokens
        model = self.loaded.model
        for batch in self.material.batches(
            0, lambda: (state.regress_steps, state.regress_tokens), wanted
        ):
            seed = [self.settings.seed, 8, state.regress_steps]
            dice = np.random.default_rng(seed)
            policy = DamagePolicy(self._tau(dice), damage=self.damage)
            regression.begin(
                policy,
                batch,
                share=schedule(state.regress_tokens / wanted),
                seed=int(dice.integers(2**62)),
            )
            self.session.hand_to(regression)
            with torch.no_grad():
                forward(model, batch, self.device, logits_to_keep=1)
            self.session.hand_to(None)
            state.regress_steps += 1
            state.regress_tokens += int(batch.counted.sum())
            if progress:
                progress("fitting layer by layer", min(state.regress_tokens, wanted), wanted)
            if state.regress_steps % _SAVE_EVERY == 0:
                save()

    def _tau(self, dice: np.random.Generator) -> float:
        return float(self.low * (self.high / self.low) ** dice.random())

    def _key(self, rank: int) -> str:
        """What a checkpoint was made with, down to the text and the model's routers."""
        about = (self.settings, rank, self.damage.hash, self.start.hash, self.low, self.high)
        model = (identity(self.loaded), self.loaded.dtype, self.loaded.window)
        return sha256_of([str(about), str(model), *self.material.identity()])

    def _step(self, trainable: Trainable, optimiser: Any, batch: ForwardContext) -> None:
        """One descent at a tau of its own."""
        state, dice = self.state, np.random.default_rng([self.settings.seed, 7, self.state.steps])
        for group in optimiser.param_groups:
            group["lr"] = self.settings.rate * schedule(state.tokens / self.settings.tokens)
        tau = self._tau(dice)
        teacher = self._teacher(batch)
        with torch.enable_grad():
            self.session.as_student(
                DamagePolicy(tau, damage=self.damage), trainable.compensation(), batch
            )
            student = forward(self.loaded.model, batch, self.device)
            found, gradient = divergence(student.detach(), teacher, batch, gradient=True)
            optimiser.zero_grad()
            student.backward(gradient)
        for parameter in trainable.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(found.tokens, 1)  # of the mean
        torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
        optimiser.step()
        state.steps += 1
        state.tokens += int(batch.counted.sum())

    def _teacher(self, batch: ForwardContext) -> Tensor:
        self.session.as_teacher()
        with torch.no_grad():
            return forward(self.loaded.model, batch, self.device)

    def _look(self, held: list[ForwardContext], compensation: Compensation | None) -> float:
        """Held-out divergence, nats per token, over the fixed taus."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in held:
                teacher = self._teacher(batch)
                for tau in self.looks_taus:
                    policy = DamagePolicy(tau, damage=self.damage)
                    self.session.as_student(policy, compensation, batch)
                    student = forward(self.loaded.model, batch, self.device)
                    found: Divergence = divergence(student, teacher, batch, gradient=False)[0]
                    total, tokens = total + found.total, tokens + found.tokens
        return total / max(tokens, 1)

    def _input_scale(self, batch: ForwardContext) -> Tensor:
        """One over the root mean square of each layer's input. (L,)"""
        self.session.sizes = []
        self._teacher(batch)
        sizes, self.session.sizes = self.session.sizes, None
        return torch.tensor([1 / max(size, 1e-6) for size in sizes])
