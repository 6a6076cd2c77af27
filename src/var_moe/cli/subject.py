"""What the measuring commands share: the model and text they are asked about, made ready."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.config import check_count
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from var_moe.calibration.fitted_files import FittedCompensation
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.cli.options import ModelOptions, RunOptions, SpeedOptions, TextOptions
    from var_moe.data.documents import TextSplit
    from var_moe.evaluation.evaluator import Evaluator, Progress
    from var_moe.evaluation.speed_setting import SpeedSetting
    from var_moe.models.loading import LoadedModel
    from var_moe.optimization.candidate import Candidate
    from var_moe.optimization.preparation import EncodedText


def named_candidates(
    files: Sequence[Path], presets: Sequence[str], mode: str | None
) -> dict[str, Candidate]:
    """The configurations and presets that a command line names, in VAR's ``mode`` if one is."""
    from var_moe.optimization.candidate import load_candidate, preset

    loaded = {str(path): load_candidate(path).in_mode(mode) for path in files}
    return loaded | {name: preset(name, mode) for name in presets}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and a text as a command line names them.

    Args:
        profile: its folder, if one is given.
        output: folder of the results, and of a profile that is made.
        max_samples: documents of the text at the most.
        compensation: folder of a learned one, where it is not the profile's own.
        config: a configuration: the profile beside it is taken where none is given.
    """

    model: ModelOptions
    text: TextOptions
    run: RunOptions
    profile: Path | None
    output: Path
    max_samples: int | None
    compensation: Path | None = None
    config: Path | None = None
    speed: SpeedOptions | None = None

    def check(self, *, blocks: int) -> None:
        """What can be told in a moment, before a library is loaded.

        Raises:
            UsageError: names the option that is wrong.
        """
        check_count("blocks", blocks)
        check_count("max_samples", self.max_samples, 2)
        self._setting()
        self.run.begin(self.model.model, self.text.named(), output=self.output)

    def ready(
        self,
        progress: Progress,
        *,
        needs: Collection[str] = (),
        stand_ins: Collection[str | None] = (),
    ) -> Ready:
        """Load text and profile, which are quick to refuse, then the model.

        Args:
            progress: see `Evaluator`.
            needs: what the profile has to hold, by the names of `registry.CALIBRATION`.
            stand_ins: names of the compensations that are asked for.

        Raises:
            UsageError: something is missing, or does not fit the model.
        """
        from var_moe.calibration.fitted_files import load_compensation
        from var_moe.data.documents import require_documents
        from var_moe.data.text import load_text
        from var_moe.evaluation.evaluator import Evaluator
        from var_moe.optimization.preparation import sample_documents, tokenised

        text = load_text(self.text.named(), self.text.split)
        require_documents(text.documents, 2, "comparing perplexities")
        known = self._known_profile(needed=bool(needs))
        fresh = bool(needs) and known is None
        calibration = load_text(self.text.named(), "calibration") if fresh else None
        loaded = self.model.load()
        if known is not None and not self._fits(known, loaded):
            known = None
        learned = load_compensation(self.compensation, loaded) if self.compensation else None
        self._check_stand_ins(stand_ins, known, loaded.top_k)
        encoded = tokenised(text, loaded)
        documents = sample_documents(encoded.documents, self.max_samples, self.run.seed)
        require_documents(documents, 2, "comparing perplexities")
        return Ready(
            subject=self,
            loaded=loaded,
            text=encoded,
            evaluator=Evaluator(loaded, documents, setting=self._setting(), progress=progress),
            needs=frozenset(needs),
            known=known,
            learned=learned,
            calibration=calibration,
        )

    def _setting(self) -> SpeedSetting:
        from var_moe.cli.options import SpeedOptions

        return (self.speed or SpeedOptions()).setting()

    def _known_profile(self, *, needed: bool) -> RoutingProfile | None:
        """The profile that is given, or else the one that lies beside the configuration."""
        from var_moe.calibration.profile import RoutingProfile
        from var_moe.optimization.validation import profile_beside

        if self.profile is not None:
            return RoutingProfile.load(self.profile)
        return profile_beside(self.config) if self.config is not None and needed else None

    def _fits(self, known: RoutingProfile, loaded: LoadedModel) -> bool:
        """Whether the profile is the model's; one that is given has to be.

        A configuration may be tried on another model than it was found on: then the profile
        beside it is left alone.
        """
        try:
            known.check_loaded(loaded)
        except UsageError:
            if self.profile is not None:
                raise
            return False
        return True

    def _check_stand_ins(
        self, names: Collection[str | None], known: RoutingProfile | None, top_k: int
    ) -> None:
        """Refuse a compensation that there can't be, before a profile is made for it."""
        from var_moe.calibration.fitted_files import FOLDER
        from var_moe.calibration.profile import check_compensation
        from var_moe.calibration.statistics import means_by_pair
        from var_moe.optimization.preparation import PROFILE_FOLDER

        earlier = known is None and (self.output / PROFILE_FOLDER / FOLDER).is_dir()
        fresh = ["none", "means"] if means_by_pair(top_k) else ["none"]
        possible = list(known.compensations()) if known else fresh
        possible += ["learned"] if self.compensation or earlier else []
        for name in names:
            if name is not None:
                check_compensation(name, possible)


@dataclass(kw_only=True)
class Ready:
    """A subject that can be measured.

    Args:
        known: the profile where there is one; else it is made of the calibration split, where
            something is needed of one.
        learned: the compensation that takes the place of the profile's own.
    """

    subject: Subject
    loaded: LoadedModel
    text: EncodedText
    evaluator: Evaluator
    needs: frozenset[str]
    known: RoutingProfile | None
    learned: FittedCompensation | None
    calibration: TextSplit | None

    @cached_property
    def profile(self) -> RoutingProfile | None:
        """The profile, made when first asked for; None where nothing is needed of one."""
        from var_moe.optimization.preparation import obtain_profile

        profile = self.known
        if profile is None and self.needs:
            profile, _ = obtain_profile(
                self.loaded,
                self.text.dataset,
                given=None,
                folder=self.subject.output,
                damages="damage" in self.needs,
                calibration=self.calibration,
                progress=self.evaluator.progress,
            )
        if profile is None or self.learned is None:
            return profile
        return profile.with_compensation(self.learned)

    def calibration_with(self, compensation: str | None) -> dict[str, Any]:
        """What policies may ask for; see `RoutingProfile.calibration`."""
        return {} if self.profile is None else self.profile.calibration(compensation)

    def result(self, rows: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
        """The rows as a result file, with what they were measured on."""
        from var_moe.storage import SCHEMA_VERSION, jsonable, provenance

        notes, profile, loaded = self.evaluator.timing_notes(), self.profile, self.loaded
        if profile is not None and self.text.data_hash == profile.head["data_hash"]:
            notes.append("this text was profiled: policies look better on it than on unseen text")
        result: dict[str, Any] = jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "rows": rows,
                "notes": notes,
                **further,
                "documents": len(self.evaluator.documents),
                "text": self.text.to_dict(),
                "profile_hash": None if profile is None else profile.hash,
                "setting": self.evaluator.setting.to_dict(),
                "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
                "seed": self.subject.run.seed,
                "provenance": provenance(),
            }
        )
        return result
