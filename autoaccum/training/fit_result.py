"""What `fit` gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from autoaccum.checking.verify import VerifyReport
from autoaccum.display.shown import Drawn
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.training.length_summary import LengthSummary
from autoaccum.window.record import StepRecord

__all__ = ["FitResult"]


@dataclass(frozen=True)
class FitResult(Drawn):
    """What `fit` gives back.

    Attributes:
        model: the trained model, the same object.
        plan: as it was at the end; k may have grown after an out-of-memory error.
        probe: None where the micro-batch or the plan was given.
        verify: None where the check was switched off.
        history: one record a window, also of those before a resume.
        evaluations: one dict an epoch, with "epoch" and "step"; empty without validation data.
        unsaved: what of the checkpoints and the run's record could not be saved; None where all was.
        stopped: why the training ended before its time, at a listener's wish; None where it ran to its end.
        lengths: tokens a second, padding, and micro-batches a window, where samples differ in length; else None.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    probe: ProbeReport | None = field(repr=False)
    verify: VerifyReport | None
    history: Sequence[StepRecord] = field(repr=False)
    evaluations: list[dict[str, float]]
    unsaved: str | None = None
    stopped: str | None = None
    lengths: LengthSummary | None = None

    _view = "fit_view"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the model."""
        return {
            "plan": self.plan.to_dict(),
            "probe": self.probe.to_dict() if self.probe is not None else None,
            "verify": self.verify.to_dict() if self.verify is not None else None,
            "history": [record.to_dict() for record in self.history],
            "evaluations": self.evaluations,
            "unsaved": self.unsaved,
            "stopped": self.stopped,
            "lengths": self.lengths.to_dict() if self.lengths is not None else None,
        }
