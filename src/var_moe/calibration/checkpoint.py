"""The checkpoint of a fit: parameters, optimiser, progress, and the best state so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from var_moe.calibration.distill import Trainable
from var_moe.routing.compensation import Compensation, LayerCompensation
from var_moe.storage import atomic_write


class Checkpoint:
    """One file, written whole; what another fit left in it is not gone on with.

    Args:
        path: of the file; None keeps nothing.
        key: what the fit depends on.
    """

    def __init__(self, path: Path | None, *, key: str) -> None:
        self._path, self._key = path, key

    def _read(self) -> dict[str, Any] | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            content = torch.load(self._path, weights_only=True)
        except Exception:  # a damaged file is as good as none
            return None
        return content if isinstance(content, dict) and content.get("key") == self._key else None

    def save(
        self,
        trainable: Trainable,
        optimisers: Sequence[Any],
        state: dict[str, Any],
        best: Compensation,
    ) -> None:
        """Write everything that `load` gives back."""
        if self._path is None:
            return
        content = {
            "key": self._key,
            "trainable": trainable.state_dict(),
            "optimisers": [one.state_dict() for one in optimisers],
            "state": dict(state),
            "best": [list(part.tensors()) for part in best.layers],
        }
        atomic_write(self._path, lambda temporary: torch.save(content, temporary))

    def load(
        self, trainable: Trainable, optimisers: Sequence[Any]
    ) -> tuple[dict[str, Any], Compensation] | None:
        """Fill them, and return the state and the best; None where there is nothing to go on."""
        content = self._read()
        if content is None:
            return None
        trainable.load_state_dict(content["trainable"])
        for optimiser, one in zip(optimisers, content["optimisers"], strict=True):
            optimiser.load_state_dict(one)
        best = Compensation(
            layers=tuple(LayerCompensation(*part) for part in content["best"]),
            by_pair=trainable.by_pair,
            experts=trainable.experts,
        )
        return content["state"], best

    def remove(self) -> None:
        """The fit has come to nothing."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
