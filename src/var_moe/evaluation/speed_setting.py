"""What throughput is measured on: scoring text, or generating, and how much at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from var_moe.config import check_count
from var_moe.errors import UsageError

if TYPE_CHECKING:  # a command checks its setting before it loads torch
    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.throughput import Arm, ArmGroup

OBJECTIVES = ("prefill", "decode")
NEW_TOKENS = 128
_PROMPT: dict[str, Any] = {"batch_size": 1, "sequence": 32, "forwards": 1}


@dataclass(frozen=True, kw_only=True)
class SpeedSetting:
    """What throughput is measured on; recorded with every result.

    Args:
        objective: ``"prefill"`` scores text, ``"decode"`` generates after prompts.
        batch_size: rows of a batch.
        sequence: tokens of a row, or of a prompt.
        forwards: batches of a timed block.
        new_tokens: generated for each prompt.
    """

    objective: str = "prefill"
    batch_size: int = 8
    sequence: int = 256
    forwards: int = 2
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(
                f"objective {self.objective!r}: expected one of {', '.join(OBJECTIVES)}"
            )
        for name in ("batch_size", "sequence", "forwards", "new_tokens"):
            check_count(name, getattr(self, name), 1)

    @classmethod
    def of(cls, objective: str = "prefill", batch_size: int | None = None) -> SpeedSetting:
        """The setting of an objective: by default 8 rows of 256 tokens, or one prompt of 32."""
        given: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        if objective == "prefill":
            return cls(**given)
        return cls(objective=objective, **_PROMPT | given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedSetting:
        """Read what `to_dict` gave; older files know no objective."""
        names = {"forwards_per_block": "forwards"}
        known = cls.__dataclass_fields__
        values = {names.get(name, name): value for name, value in values.items()}
        return cls(**{name: value for name, value in values.items() if name in known})

    @property
    def decodes(self) -> bool:
        """Whether text is generated."""
        return self.objective == "decode"

    @property
    def described(self) -> str:
        """In words, as ``8 x 256 tokens``."""
        if self.decodes:
            return f"after {self.batch_size} prompt(s) at once"
        return f"{self.batch_size} x {self.sequence} tokens"

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward: those of a batch, or one for each prompt."""
        return self.batch_size * (1 if self.decodes else self.sequence)

    @property
    def block_forwards(self) -> int:
        """Forwards of a timed block. Reading the prompts counts as one."""
        return self.forwards * (self.new_tokens if self.decodes else 1)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        import torch

        generated = {"new_tokens": self.new_tokens} if self.decodes else {}
        return {
            "objective": self.objective,
            "batch_size": self.batch_size,
            "sequence": self.sequence,
            "forwards_per_block": self.forwards,
            **generated,
            "threads": torch.get_num_threads(),
        }

    def group(
        self, documents: Sequence[EncodedDocument], arms: Mapping[str, Arm], **drawn: int
    ) -> ArmGroup:
        """Arms, to be timed in this setting on a text; options are those of `full_batches`."""
        from var_moe.evaluation.batching import full_batches
        from var_moe.evaluation.throughput import ArmGroup, generating, score

        rows = {"batch_size": self.batch_size, "sequence": self.sequence}
        batches = full_batches(documents, forwards=self.forwards, **rows, **drawn)
        run = generating(self.new_tokens) if self.decodes else score
        return ArmGroup(
            arms, batches, self.forwards, run, self.forward_tokens * self.block_forwards
        )
