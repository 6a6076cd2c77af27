"""Fitting a compensation by distillation on calibration text (see `routing.compensation`).

Each step cuts decisions at another tau, so that the result serves a range of experts per token.
What is fitted is judged on held-out calibration documents, at fixed taus; the best state counts,
and one that is no better there than the start is not handed out.
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

from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import batches, collate
from var_moe.fitting.checkpoint import Checkpoint
from var_moe.fitting.distill import Distillation, Divergence, Trainable, divergence, forward
from var_moe.models.identity import identity
from var_moe.models.seam import attach, detach, experts_modules, experts_shape, pair_backend
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.storage import sha256_of

if TYPE_CHECKING:
    from var_moe.evaluation.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.decision import TokenBatch

log = logging.getLogger(__name__)

DEFAULT_TOKENS = 1_200_000
COST_SHARE = 0.03
"""What the map may cost, as a share of the multiply-adds that it helps to save."""
KEPT_SHARES = (0.55, 0.8)
"""Experts per token during fitting, as shares of K."""
_HELD_OUT, _HELD_OUT_TOKENS = 0.1, 8_000
_LOOKS = 12  # evaluations on held-out text in a whole run
_PATIENCE = 4  # of them without an improvement
_RATE, _WARM = 4e-3, 0.1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a compensation is fitted.

    Args:
        rank: of the map; None takes the largest multiple of 8 within `COST_SHARE`.
        tokens: of calibration text, over as many passes as that takes.
        tokens_per_batch: padded tokens of a step.
        rate: highest learning rate of Adam.
        seed: draws the start, the order of the text and the taus.

    Raises:
        UsageError: a number is out of its range.
    """

    rank: int | None = None
    tokens: int = DEFAULT_TOKENS
    tokens_per_batch: int = 4096
    rate: float = _RATE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 0:
            raise UsageError(f"rank = {self.rank}: expected at least 0")
        for name in ("tokens", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"rate = {self.rate}: expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A fitted compensation and how it came about."""

    compensation: Compensation
    held_out: dict[str, float]  # nats per token: "nothing", "start", "fitted"
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
        self.session = Distillation(pair_backend(backend))
        self.device = torch.device(loaded.device)
        self.low, self.high = min(taus), max(taus)
        order = np.random.default_rng(settings.seed).permutation(len(documents))
        self.held_out, self.text = _split([documents[i] for i in order])
        self.looks_taus = tuple(np.geomspace(self.low, self.high, 4)[1:].tolist())
        self.state = _State()

    def run(self, checkpoint: Path | None, progress: Progress | None) -> FitResult:
        settings = self.settings
        rank = settings.rank
        if rank is None:
            rank = affordable_rank(self.loaded.model, self.loaded.top_k)
        held = self._held_out_batches()
        trainable = Trainable(
            self.start, rank=rank, scale=self._input_scale(held[0]), seed=settings.seed
        ).to(self.device)
        optimiser = torch.optim.Adam(trainable.parameters(), lr=settings.rate)
        nothing, begun = self._look(held, None), self._look(held, trainable.compensation())
        saved = Checkpoint(checkpoint, key=self._key(rank))
        best = trainable.frozen()
        restored = saved.load(trainable, optimiser)
        if restored is not None:
            self.state, best = _State(**restored[0]), restored[1]
        each = max(1, settings.tokens // _LOOKS)
        for batch in self._batches():
            if self.state.since >= _PATIENCE:
                break  # here already where a killed run had come so far
            self._step(trainable, optimiser, batch)
            if progress:
                progress("fitting", min(self.state.tokens, settings.tokens), settings.tokens)
            done = self.state.tokens >= settings.tokens
            if not done and self.state.tokens // each == len(self.state.curve):
                continue
            here = self._look(held, trainable.compensation())
            self.state.curve.append((self.state.tokens, here))
            self.state.since += 1
            if here < self.state.best:
                self.state.best, self.state.since, best = here, 0, trainable.frozen()
            saved.save(trainable, optimiser, self.state.__dict__, best)
        stopped = "the text asked for is used up"
        if self.state.since >= _PATIENCE:
            stopped = f"no improvement on held-out text in {_PATIENCE} looks"
        worst = min(nothing, begun)
        if not self.state.best < worst:
            saved.remove()
            raise VarMoeError(
                f"the fitted compensation is no better on held-out text ({self.state.best:.4f} "
                f"nats per token) than none or the start ({worst:.4f}); nothing was saved; try "
                "more --tokens or a lower --rate"
            )
        return FitResult(
            compensation=best,
            held_out={"nothing": nothing, "start": begun, "fitted": self.state.best},
            curve=self.state.curve,
            tokens=self.state.tokens,
            taus=self.looks_taus,
            stopped=stopped,
        )

    def _key(self, rank: int) -> str:
        """What a checkpoint was made with, down to the text and the model's routers."""
        about = (self.settings, rank, self.damage.hash, self.start.hash, self.low, self.high)
        model = (identity(self.loaded), self.loaded.dtype, self.loaded.window)
        text = (document.ids.tobytes() for document in (*self.held_out, *self.text))
        return sha256_of([str(about), str(model), *text])

    def _held_out_batches(self) -> list[TokenBatch]:
        size, window = self.settings.tokens_per_batch, self.loaded.window
        return [collate(rows) for rows in batches(self.held_out, size, window=window)]

    def _batches(self) -> Any:
        """Batches of the text, pass after pass in another order, from where the state stands."""
        size, window = self.settings.tokens_per_batch, self.loaded.window
        number = step = 0
        while True:
            rows = list(batches(self.text, size, window=window))
            for at in np.random.default_rng([self.settings.seed, number]).permutation(len(rows)):
                if self.state.tokens >= self.settings.tokens:
                    return
                step += 1
                if step > self.state.steps:
                    yield collate(rows[at])
            number += 1

    def _step(self, trainable: Trainable, optimiser: Any, batch: TokenBatch) -> None:
        """One descent at a tau of its own."""
        state, dice = self.state, np.random.default_rng([self.settings.seed, 7, self.state.steps])
        for group in optimiser.param_groups:
            group["lr"] = self.settings.rate * _schedule(state.tokens / self.settings.tokens)
        tau = self.low * (self.high / self.low) ** dice.random()
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

    def _teacher(self, batch: TokenBatch) -> Tensor:
        self.session.as_teacher()
        with torch.no_grad():
            return forward(self.loaded.model, batch, self.device)

    def _look(self, held: list[TokenBatch], compensation: Compensation | None) -> float:
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

    def _input_scale(self, batch: TokenBatch) -> Tensor:
        """One over the root mean square of each layer's input. (L,)"""
        self.session.sizes = []
        self._teacher(batch)
        sizes, self.session.sizes = self.session.sizes, None
        return torch.tensor([1 / max(size, 1e-6) for size in sizes])


def _schedule(done: float) -> float:
    """Share of the highest learning rate: a short rise, then a cosine to zero."""
    if done < _WARM:
        return max(done / _WARM, 0.02)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (done - _WARM) / (1 - _WARM)))))


def _split(
    documents: list[EncodedDocument],
) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """Held-out documents, and the others.

    Raises:
        UsageError: there are too few.
    """
    total = sum(len(document.ids) for document in documents)
    wanted = min(_HELD_OUT_TOKENS, int(_HELD_OUT * total))
    sizes = np.cumsum([len(document.ids) for document in documents])
    count = int(np.searchsorted(sizes, wanted)) + 1
    if len(documents) < 4 or count >= len(documents):
        raise UsageError(
            f"{len(documents)} calibration documents, {total:,} tokens: too few to fit on some and "
            "judge on others; give more text"
        )
    return documents[:count], documents[count:]
