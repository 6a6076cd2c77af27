"""Fitting a compensation on calibration text (see `routing.compensation`).

First layer by layer, by least squares, then by distillation of the whole model, which costs three
times as much per token (see `calibration.distillation`). Each step cuts decisions at another tau,
so that the result serves a range of experts per token. A fit is judged by its divergence from the
unmodified model on held-out calibration documents, at fixed taus. The best state is returned; it
is an error if it is no better than the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.calibration.distillation import (
    InputSizes,
    Regression,
    Student,
    affordable_rank,
    divergence,
    frozen,
    parameters_of,
    set_rate,
    trainable,
)
from var_moe.config import check_count, check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import Window, batches, collate, logits_of
from var_moe.execution.backends import open_backend
from var_moe.execution.dispatch import dispatched
from var_moe.models.identity import identity
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.routing.simple import NativePolicy
from var_moe.storage import atomic_write, sha256_of

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Progress
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.decision import ForwardContext

KEPT_SHARES = (0.55, 0.8)
"""Experts per token during fitting, as shares of K."""
_FORMAT = 2  # of checkpoints
_SAVE_EVERY = 20  # steps of the layer-wise part
_LOOKS = 12  # evaluations on held-out text in a whole run
_PATIENCE = 4  # of them without an improvement
REGRESSION_RATE = 4e-3  # highest learning rate of the layer-wise part
_HELD_OUT, _HELD_OUT_TOKENS = 0.1, 8_000  # share of the text and its most, that judge the fit


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a compensation is fitted.

    A number out of its range is a UsageError.
    """

    # Of the map; None takes the largest multiple of 8 within 3% of what it saves.
    rank: int | None = None
    # Calibration tokens of the layer-wise part and of the distillation, over as many passes as
    # that takes; 0 leaves a part out.
    regress_tokens: int = 800_000
    tokens: int = 400_000
    tokens_per_batch: int = 4096  # padded tokens of a step
    rate: float = 1e-3  # highest learning rate of the distillation
    seed: int = 0  # draws the start, the order of the text and the taus

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("rank", "regress_tokens", "tokens"):
            check_count(name, getattr(self, name), 0)
        check_count("tokens_per_batch", self.tokens_per_batch)
        if not self.tokens and not self.regress_tokens:
            raise UsageError("tokens = regress_tokens = 0: expected one of them above 0")
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"rate = {self.rate}: expected a number above 0")


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
) -> tuple[Compensation, dict[str, Any]]:
    """Distil the unmodified model into what a damage policy leaves of it.

    Args:
        loaded: the model.
        documents: calibration text; a part is held out.
        damage: which decisions are cut.
        taus: the smallest and the largest tau of a step (see `tau_for`).
        start: what the vectors begin with, such as residual means.
        settings: see `FitSettings`.
        checkpoint: file that a killed run goes on from; who has saved the result removes it.
        progress: called with what is done, tokens done and in all.

    Returns:
        The compensation, and how the fit went, for the head of a file.

    Raises:
        UsageError: too little text, or a start of another model.
        VarMoeError: the result is no better than the start on held-out text.
    """
    settings = settings or FitSettings()
    start.check(**experts_shape(loaded.model))
    fit = _Fit(loaded, documents, damage, taus, start, settings, checkpoint, progress)
    asked = [p.requires_grad for p in loaded.model.parameters()]
    try:
        loaded.model.requires_grad_(False)
        with torch.inference_mode(False):
            return fit.run()
    finally:
        for parameter, value in zip(loaded.model.parameters(), asked, strict=True):
            parameter.requires_grad_(value)


@dataclass
class _State:
    """How far a fit is: what a checkpoint holds besides tensors."""

    regress_steps: int = 0
    regress_tokens: int = 0
    regressed: float | None = None  # held-out divergence after the layer-wise part
    steps: int = 0
    tokens: int = 0
    best: float = float("inf")
    since: int = 0  # looks without an improvement
    curve: list[tuple[int, float]] = field(default_factory=list)


class _Fit:
    """One fit: its text, what is trained, and how far it is."""

    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[EncodedDocument],
        damage: DamageModel,
        taus: Sequence[float],
        start: Compensation,
        settings: FitSettings,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.loaded, self.damage, self.settings = loaded, damage, settings
        self.checkpoint = checkpoint
        self.tell = progress or (lambda what, done, total: None)
        self.backend = open_backend("sorted")
        self.low, self.high = min(taus), max(taus)
        self.looks_taus = tuple(np.geomspace(self.low, self.high, 4)[1:].tolist())
        order = np.random.default_rng(settings.seed).permutation(len(documents))
        held_out, self.text = split([documents[i] for i in order])
        self.held_out = [collate(rows) for rows in self._batches(held_out)]
        self.state, self.start = _State(), start
        self.rank = settings.rank
        if self.rank is None:
            self.rank = affordable_rank(loaded.model, loaded.top_k)
        about = (settings, self.rank, damage.hash, start.hash, self.low, self.high)
        model = (identity(loaded), loaded.dtype, loaded.window)
        text = (document.ids.tobytes() for document in (*held_out, *self.text))
        self.key = sha256_of([str(_FORMAT), str(about), str(model), *text])

    def run(self) -> tuple[Compensation, dict[str, Any]]:
        """Both parts, from a checkpoint on where there is one."""
        settings, state = self.settings, self.state
        inputs = InputSizes()
        self._forward(Student(self.backend, inputs, self.held_out[0]))
        scale = torch.tensor([1 / max(size, 1e-6) for size in inputs.sizes])  # (L,)
        self.trainable = trainable(
            self.start,
            rank=self.rank or 0,
            scale=scale.to(self.loaded.device),
            seed=settings.seed,
        )
        parameters = parameters_of(self.trainable)
        self.optimisers = {
            "regression": torch.optim.Adam(parameters, lr=REGRESSION_RATE),
            "distillation": torch.optim.Adam(parameters, lr=settings.rate),
        }
        before = {"nothing": self._look(None), "start": self._look(self.trainable)}
        self.best = frozen(self.trainable)
        self._resume()
        self._regress()
        if state.regressed is None:
            state.regressed = self._look(self.trainable)
            if settings.regress_tokens:
                state.best, self.best = state.regressed, frozen(self.trainable)
                self._save()
        self._distil()
        worst = min(before.values())
        if not state.best < worst:
            if self.checkpoint is not None:
                self.checkpoint.unlink(missing_ok=True)
            raise VarMoeError(
                f"the fitted compensation is no better on held-out text ({state.best:.4f} "
                f"nats per token) than none or the start ({worst:.4f}); nothing was saved; try "
                "more --tokens or a lower --rate"
            )
        stopped = "the text asked for is used up"
        if state.since >= _PATIENCE:
            stopped = f"no improvement on held-out text in {_PATIENCE} looks"
        fit = {
            "rank": self.best.rank,
            "held_out_divergence_nats": before
            | {"regressed": state.regressed, "fitted": state.best},
            "curve": [{"tokens": t, "held_out_divergence_nats": d} for t, d in state.curve],
            "fitted_tokens": state.regress_tokens + state.tokens,
            "held_out_taus": list(self.looks_taus),
            "stopped": stopped,
        }
        return self.best, fit

    def _regress(self) -> None:
        """The layer-wise part, from where the state stands."""
        state, wanted = self.state, self.settings.regress_tokens
        optimiser = self.optimisers["regression"]
        for rows in islice(self._passes(0), state.regress_steps, None):
            if state.regress_tokens >= wanted:
                break
            batch, rng = collate(rows), self._rng(8, state.regress_steps)
            policy = DamagePolicy(self._tau(rng), damage=self.damage)
            set_rate(optimiser, REGRESSION_RATE, state.regress_tokens / wanted)
            session = Regression(
                self.backend,
                policy,
                batch,
                trainable=self.trainable,
                optimiser=optimiser,
                rng=torch.Generator().manual_seed(int(rng.integers(2**62))),
            )
            self._forward(session, logits_to_keep=1)
            state.regress_steps += 1
            state.regress_tokens += int(batch.counted.sum())
            self.tell("fitting layer by layer", min(state.regress_tokens, wanted), wanted)
            if state.regress_steps % _SAVE_EVERY == 0:
                self._save()

    def _distil(self) -> None:
        """The distillation, from where the state stands, until text or patience is used up."""
        state, wanted = self.state, self.settings.tokens
        each = max(1, wanted // _LOOKS)
        for rows in islice(self._passes(1), state.steps, None):
            if state.tokens >= wanted or state.since >= _PATIENCE:
                break
            self._step(collate(rows))
            self.tell("distilling", min(state.tokens, wanted), wanted)
            if state.tokens < wanted and state.tokens // each == len(state.curve):
                continue
            here = self._look(self.trainable)
            state.curve.append((state.tokens, here))
            state.since += 1
            if here < state.best:
                state.best, state.since, self.best = here, 0, frozen(self.trainable)
            self._save()

    def _step(self, batch: ForwardContext) -> None:
        """One step of descent, at a tau of its own."""
        state, optimiser = self.state, self.optimisers["distillation"]
        set_rate(optimiser, self.settings.rate, state.tokens / self.settings.tokens)
        tau = self._tau(self._rng(7, state.steps))
        teacher = self._forward(Student(self.backend, NativePolicy(), batch))
        student = self._forward(self._student(batch, tau, self.trainable), grad=True)
        _, tokens, gradient = divergence(student.detach(), teacher, batch, gradient=True)
        optimiser.zero_grad()
        student.backward(gradient)
        for parameter in parameters_of(self.trainable):
            if parameter.grad is not None:
                parameter.grad /= max(tokens, 1)  # of the mean
        torch.nn.utils.clip_grad_norm_(parameters_of(self.trainable), 1.0)
        optimiser.step()
        state.steps += 1
        state.tokens += int(batch.counted.sum())

    def _look(self, compensation: Compensation | None) -> float:
        """Held-out divergence, nats per token, over the fixed taus."""
        total, tokens = 0.0, 0
        for batch in self.held_out:
            teacher = self._forward(Student(self.backend, NativePolicy(), batch))
            for tau in self.looks_taus:
                student = self._forward(self._student(batch, tau, compensation))
                loss, places, _ = divergence(student, teacher, batch, gradient=False)
                total, tokens = total + loss, tokens + places
        return total / max(tokens, 1)

    def _student(
        self, batch: ForwardContext, tau: float, compensation: Compensation | None
    ) -> Student:
        policy = DamagePolicy(tau, damage=self.damage)
        return Student(self.backend, policy, batch, compensation)

    def _forward(self, session: Student, *, grad: bool = False, **options: Any) -> Tensor:
        """Logits of the session's tokens, with or without gradients. (B, S, V)"""
        model = self.loaded.model
        with dispatched(model, session), torch.set_grad_enabled(grad):
            return logits_of(model, session.context, **options)

    def _rng(self, part: int, step: int) -> np.random.Generator:
        """Random numbers of one step, so that a resumed fit draws the same."""
        return np.random.default_rng([self.settings.seed, part, step])

    def _tau(self, rng: np.random.Generator) -> float:
        return float(self.low * (self.high / self.low) ** rng.random())

    def _batches(self, documents: Sequence[EncodedDocument]) -> Iterator[list[Window]]:
        return batches(documents, self.settings.tokens_per_batch, window=self.loaded.window)

    def _passes(self, part: int) -> Iterator[list[Window]]:
        """The text without end, each pass in another order; the fit's parts have their own."""
        number = 0
        while True:
            rows = list(self._batches(self.text))
            order = np.random.default_rng([self.settings.seed, part, number])
            yield from (rows[at] for at in order.permutation(len(rows)))
            number += 1

    def _save(self) -> None:
        """Write a checkpoint, from which `_resume` goes on."""
        if self.checkpoint is None:
            return
        content = {
            "key": self.key,
            "state": asdict(self.state),
            "optimisers": {name: one.state_dict() for name, one in self.optimisers.items()},
            "trainable": parameters_of(self.trainable),
            "best": parameters_of(self.best),
        }
        atomic_write(self.checkpoint, lambda temporary: torch.save(content, temporary))

    def _resume(self) -> None:
        """Go on from a checkpoint of this very fit, where there is one."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        try:
            content = torch.load(self.checkpoint, weights_only=True)
        except Exception:  # a damaged file is as good as none
            return
        if not isinstance(content, dict) or content.get("key") != self.key:
            return
        self.state.__dict__.update(content["state"])
        for name, state in content["optimisers"].items():
            self.optimisers[name].load_state_dict(state)
        for name, compensation in (("trainable", self.trainable), ("best", self.best)):
            for mine, saved in zip(parameters_of(compensation), content[name], strict=True):
                mine.data.copy_(saved)


def split(
    documents: list[EncodedDocument],
) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """Held-out documents, and the others; too few are a UsageError."""
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
