"""Healing: some of the model's own weights learn to live with the cuts.

It goes on from a fitted compensation with the same distillation, step by step: first the routers'
and the normalisations' weights (``router``, ``norms``), then low-rank adapters on the attention
and the experts (``lora``); the compensation is trained along. The teacher is the unmodified model
at all times. A step that is no better on held-out text, at equal experts per token, is not kept.

Training on more text may improve any model, so there is a control: the same weights, from zero, on
the same batches, as many steps, by the text's own cross-entropy, without cuts or compensation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import expm1
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from var_moe.calibration.adapters import RANK, Adapters, adapters
from var_moe.calibration.checkpoint import Checkpoint
from var_moe.calibration.descent import Descent, Progressed
from var_moe.calibration.distill import Distillation, Trainable, divergence, forward
from var_moe.calibration.healed_files import AdapterLayout, healed_head
from var_moe.calibration.looks import Examiner, Look
from var_moe.calibration.material import Material
from var_moe.calibration.weights import LORA, PARTS, Differences, weights_of
from var_moe.config import check_count
from var_moe.errors import UsageError
from var_moe.execution.dispatch import attach, detach, experts_modules, pair_backend
from var_moe.extras import require
from var_moe.models.identity import identity
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.routing.decision import TokenBatch
from var_moe.routing.healed import Change, Healed
from var_moe.storage import sha256_of
from var_moe.tracing.loss import loss_and_gradient, scored_targets

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

TOKENS, RATE = 400_000, 3e-4
_FIRST_PART = 2  # of the text's orders: those before are the compensation's own
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """What is healed, and how long.

    Args:
        parts: of ``router``, ``norms``, ``lora``.
        tokens: of calibration text for each step.
        rate: highest learning rate of Adam.
        lora_rank: of the adapters.
        control: also train the control.

    Raises:
        UsageError: unknown parts, or a number out of its range.
    """

    parts: tuple[str, ...]
    tokens: int = TOKENS
    rate: float = RATE
    lora_rank: int = RANK
    control: bool = False

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            asked = ",".join(self.parts)
            raise UsageError(f"--heal {asked!r}: expected some of {', '.join(PARTS)}")
        for name in ("tokens", "lora_rank"):
            check_count(f"heal {name}", getattr(self, name))
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"heal rate = {self.rate}: expected a number above 0")
        if LORA in self.parts:
            require("peft")

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """Parts by step, in the order of training."""
        first = tuple(part for part in PARTS if part in self.parts and part != LORA)
        return tuple(step for step in (first, (LORA,) if LORA in self.parts else ()) if step)


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """A compensation with healed weights, and how they came about.

    ``report`` goes under "heal" into the head of the files; ``files`` under "healed".
    """

    compensation: Compensation
    report: dict[str, Any]
    files: dict[str, Any] | None


@dataclass(frozen=True)
class _State:
    """What has been reached."""

    compensation: Compensation | None
    changes: dict[str, Change]
    layout: AdapterLayout | None = None

    @property
    def names(self) -> list[str]:
        return [name for name, change in self.changes.items() if len(change) == 1]


def heal(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    damage: DamageModel,
    taus: Sequence[float],
    looks_taus: Sequence[float],
    compensation: Compensation,
    settings: HealSettings,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    backend: str = "sorted",
) -> HealResult:
    """Heal a model under the cuts of a damage policy.

    Args:
        loaded: the model; it is the same in the end.
        documents: calibration text; the same part is held out as by `fit_compensation`.
        damage: which decisions are cut.
        taus: the smallest and the largest tau of a step.
        looks_taus: at which held-out text is judged.
        compensation: fitted already.
        settings: see `HealSettings`.
        tokens_per_batch, seed: those of the fit.
        checkpoint: file that a killed run goes on from.
        progress: called with what is done, tokens done and in all.
        backend: experts backend.

    Raises:
        UsageError: too little text, no such weights, or no peft.
    """
    run = _Heal(loaded, documents, damage, taus, settings, tokens_per_batch, seed, backend)
    run.checkpoint, run.progress = checkpoint, progress
    run.key = sha256_of([run.identity(), compensation.hash, damage.hash, *run.material.identity()])
    before = attach(loaded.model, run.session)
    parameters = [(p, p.requires_grad) for p in loaded.model.parameters()]
    try:
        loaded.model.requires_grad_(False)
        with torch.inference_mode(False):
            return run.run(compensation, looks_taus)
    finally:
        for parameter, asked in parameters:
            parameter.requires_grad_(asked)
        detach(loaded.model, before)


def better(relative: float) -> bool:
    """Whether a step is kept, by its divergence over that before it at equal experts."""
    return relative < 1


class _Student(nn.Module):
    """Everything that a step trains."""

    def __init__(
        self, compensation: Trainable | None, weights: Differences, lora: Adapters | None
    ) -> None:
        super().__init__()
        self.compensation, self.weights, self.lora = compensation, weights, lora

    def untouched(self) -> Any:
        """Within it, the model is the unmodified one."""
        return nullcontext() if self.lora is None else self.lora.disabled()

    def stand_in(self) -> Compensation | None:
        return None if self.compensation is None else self.compensation.compensation()

    def state(self) -> _State:
        """What it has come to."""
        changes: dict[str, Change] = self.weights.changes()
        if self.lora is not None:
            changes |= self.lora.changes()
        return _State(
            compensation=None if self.compensation is None else self.compensation.frozen(),
            changes=changes,
            layout=None if self.lora is None else self.lora.layout(),
        )


class _Heal:
    checkpoint: Path | None = None
    progress: Progress | None = None
    key: str = ""

    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[EncodedDocument],
        damage: DamageModel,
        taus: Sequence[float],
        settings: HealSettings,
        tokens_per_batch: int,
        seed: int,
        backend: str,
    ) -> None:
        self.loaded, self.model, self.damage = loaded, loaded.model, damage
        self.settings, self.seed = settings, seed
        self.low, self.high = min(taus), max(taus)
        self.material = Material(
            documents, window=loaded.window, tokens_per_batch=tokens_per_batch, seed=seed
        )
        self.session = Distillation(pair_backend(backend))
        self.device = torch.device(loaded.device)

    def identity(self) -> str:
        """What a checkpoint depends on, besides what is fitted and the text."""
        model = (identity(self.loaded), self.loaded.dtype, self.loaded.window)
        # A control comes after everything else: without one, nothing before it differs.
        return str((replace(self.settings, control=False), self.seed, self.low, self.high, model))

    def run(self, compensation: Compensation, looks_taus: Sequence[float]) -> HealResult:
        examiner = Examiner(
            self.session,
            self.material.held_out_batches(),
            damage=self.damage,
            taus=looks_taus,
            layers=len(experts_modules(self.model)),
            device=self.device,
        )
        state = _State(compensation, {})
        with self._student(state, (), None) as student:
            look = self._look(examiner, student)
        told: list[dict[str, Any]] = [{"name": "compensation", "kept": True, **look.to_dict()}]
        done: list[Progressed] = []
        for number, parts in enumerate(self.settings.steps):
            with self._student(state, parts, number) as student:
                ended = self._healed(examiner, student, look, number, parts)
                found = self._look(examiner, student)
                reached = student.state()
            done.append(ended)
            kept = better(ended.best)
            told.append(
                {
                    "name": ",".join(parts),
                    "kept": kept,
                    "relative_divergence_at_equal_experts": ended.best,
                    "steps": ended.steps,
                    "tokens": ended.tokens,
                    "changed_parameters": len(reached.changes),
                    **found.to_dict(),
                }
            )
            if kept:
                state, look = reached, found
        control = self._control(examiner, done) if self.settings.control else None
        healed = Healed(state.changes) if state.changes else None
        assert state.compensation is not None
        return HealResult(
            compensation=replace(state.compensation, healed=healed),
            report={
                "parts": list(self.settings.parts),
                "tokens_per_step": self.settings.tokens,
                "rate": self.settings.rate,
                "lora_rank": self.settings.lora_rank if LORA in self.settings.parts else None,
                "steps": told,
                "control": control,
            },
            files=None if healed is None else healed_head(healed, state.layout),
        )

    @contextmanager
    def _student(
        self, state: _State, parts: Sequence[str], number: int | None
    ) -> Iterator[_Student]:
        """A student that goes on from a state, with the weights of ``parts`` besides."""
        names = dict.fromkeys([*state.names, *weights_of(self.model, parts)])
        weights = Differences(self.model, list(names), state.changes)
        trainable = None if state.compensation is None else Trainable.of(state.compensation)
        if trainable is not None:
            trainable.to(self.device)
        if LORA not in parts:
            yield _Student(trainable, weights, None)
            return
        with adapters(self.model, rank=self.settings.lora_rank, seed=self.seed) as lora:
            yield _Student(trainable, weights, lora)

    def _descent(self, student: _Student, number: int, phase: str) -> Descent:
        return Descent(
            self.material,
            student,
            part=_FIRST_PART + number,
            tokens=self.settings.tokens,
            rate=self.settings.rate,
            checkpoint=Checkpoint(self.checkpoint, key=self.key, phase=f"{phase} {number}"),
        )

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        report = self.progress
        return (lambda done, total: report(what, done, total)) if report else None

    def _look(self, examiner: Examiner, student: _Student) -> Look:
        with torch.no_grad():
            called, stand_in = student.weights.called(self.model), student.stand_in()
        return examiner.look(self.model, called, stand_in, untouched=student.untouched)

    def _healed(
        self,
        examiner: Examiner,
        student: _Student,
        before: Look,
        number: int,
        parts: Sequence[str],
    ) -> Progressed:
        """One step of healing; ``best`` is its divergence relative to the look before."""

        def descend(batch: TokenBatch, dice: np.random.Generator) -> int:
            tau = float(self.low * (self.high / self.low) ** dice.random())
            policy = DamagePolicy(tau, damage=self.damage)
            self.session.as_teacher()
            with torch.no_grad(), student.untouched():
                teacher = forward(self.model, batch, self.device)
            with torch.enable_grad():
                self.session.as_student(policy, student.stand_in(), batch)
                logits = forward(student.weights.called(self.model), batch, self.device)
                found, gradient = divergence(logits.detach(), teacher, batch, gradient=True)
                logits.backward(gradient)
            return found.tokens

        def judge() -> float:
            return self._look(examiner, student).relative(before)

        told = self._told(f"healing {','.join(parts)}")
        return self._descent(student, number, "heal").run(
            descend, judge, seed=self.seed, progress=told
        )

    def _control(self, examiner: Examiner, done: Sequence[Progressed]) -> dict[str, Any]:
        """The same weights, batches and steps by cross-entropy, without cuts or compensation."""
        unmodified = loss = examiner.uncut(self.model)
        state = _State(None, {})
        for number, (parts, healed) in enumerate(zip(self.settings.steps, done, strict=True)):
            with self._student(state, parts, number) as student:
                descent = self._descent(student, number, "control")
                told = self._told(f"control of {','.join(parts)}")
                ended = self._by_text(examiner, student, descent, healed.steps, told)
                if ended.best < loss:
                    state, loss = student.state(), ended.best
        return {
            "what": "the same weights trained by cross-entropy, without cuts or compensation",
            "steps": sum(one.steps for one in done),
            "tokens": sum(one.tokens for one in done),
            "held_out_degradation_uncut": expm1(loss - unmodified),
        }

    def _by_text(
        self,
        examiner: Examiner,
        student: _Student,
        descent: Descent,
        steps: int,
        told: Callable[[int, int], None] | None,
    ) -> Progressed:
        """One step of the control; ``best`` is its held-out loss."""

        def descend(batch: TokenBatch, _dice: np.random.Generator) -> int:
            self.session.as_teacher()
            target = scored_targets(batch.counted)
            with torch.enable_grad():
                logits = forward(student.weights.called(self.model), batch, self.device)
                _, gradient = loss_and_gradient(logits.detach(), batch.ids, target)
                logits.backward(gradient)
            return len(target)

        @torch.no_grad()
        def judge() -> float:
            return examiner.uncut(student.weights.called(self.model))

        return descent.run(descend, judge, seed=self.seed, steps=steps, progress=told)
