"""What the measuring commands share: the model and text they are asked about, made ready."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.evaluation.compare import Evaluator, Progress
    from var_moe.models.loading import LoadedModel
    from var_moe.optimization.preparation import EncodedText
    from var_moe.profiling.profile import RoutingProfile


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and a text as a command line names them."""

    model: str
    dataset: str
    split: str
    profile: Path | None
    output: Path
    max_samples: int | None
    seed: int
    device: str
    dtype: str
    trust_remote_code: bool
    compensation: Path | None = None
    """Folder of a learned compensation, where it is not the profile's own."""

    def check(self, *, blocks: int, quiet: bool) -> None:
        """Everything that can be told before the model is loaded.

        Raises:
            UsageError: names the option that is wrong.
        """
        from var_moe.evaluation.text import check_dataset
        from var_moe.models.loading import check_name
        from var_moe.storage import check_output_folder

        check_output_folder(self.output)
        if blocks < 1 or (self.max_samples is not None and self.max_samples < 2):
            raise UsageError("blocks: expected at least 1; max_samples: expected at least 2")
        check_name(self.model)
        check_dataset(self.dataset)
        if not quiet:
            print(f"loading model {self.model} ...", file=sys.stderr, flush=True)

    def ready(self, progress: Progress | None) -> Ready:
        """Load model and text."""
        from var_moe.evaluation.compare import Evaluator
        from var_moe.evaluation.text import require_documents
        from var_moe.models.loading import load_model
        from var_moe.optimization.preparation import read_text, sample_documents

        loaded = load_model(
            self.model,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        text = read_text(self.dataset, self.split, loaded)
        documents = sample_documents(text.documents, self.max_samples, self.seed)
        require_documents(documents, 2, "comparing perplexities")
        return Ready(
            subject=self,
            loaded=loaded,
            text=text,
            evaluator=Evaluator(loaded, documents, progress=progress),
        )


@dataclass(kw_only=True)
class Ready:
    """A subject that can be measured."""

    subject: Subject
    loaded: LoadedModel
    text: EncodedText
    evaluator: Evaluator

    @cached_property
    def profile(self) -> RoutingProfile:
        """The profile asked for, or a fresh one; obtained when first needed."""
        from var_moe.optimization.preparation import obtain_profile
        from var_moe.profiling.fitted_files import load_compensation

        subject = self.subject
        profile, _ = obtain_profile(
            self.loaded,
            subject.dataset,
            given=subject.profile,
            folder=subject.output,
            progress=self.evaluator.progress,
        )
        if subject.compensation is not None:
            learned = load_compensation(subject.compensation, self.loaded)
            profile = profile.with_compensation(learned)
        return profile

    def result(self, rows: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
        """The rows as a result file, with what they were measured on."""
        from var_moe.optimization.results import jsonable
        from var_moe.storage import SCHEMA_VERSION, provenance

        notes = self.evaluator.timing_notes()
        if self.text.data_hash == self.profile.head["data_hash"]:
            notes.append("this text was profiled: policies look better on it than on unseen text")
        loaded = self.loaded
        found: dict[str, Any] = jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "rows": rows,
                "notes": notes,
                **further,
                "documents": len(self.evaluator.documents),
                "text": self.text.to_dict(),
                "profile_hash": self.profile.hash,
                "setting": self.evaluator.setting.to_dict(),
                "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
                "seed": self.subject.seed,
                "provenance": provenance(),
            }
        )
        return found
