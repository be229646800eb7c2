"""Measuring one trainer in one case: autoaccum must pass, a peer's figure is written down."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.problems import Gradient, Problem, Run, difference
from tests.conformance.table import PROPERTY, Figure
from tests.conformance.trainers import NotOffered, Trainer

__all__ = ["EXACT", "Figures"]

EXACT = 1e-10


class Figures:
    """What one test measures of one trainer."""

    def __init__(self, trainer: Trainer, row: int, title: str, record: Callable[[str, Any], None]) -> None:
        self._trainer, self._row, self._title, self._record = trainer, row, title, record

    def gradients(
        self, label: str, problem: Problem, *, within: float = EXACT, train: Callable[[], Run] | None = None
    ) -> Run | None:
        """Trains, and compares each step's gradient with that of its samples in one batch.

        A step that was not taken counts as a gradient of 0. Returns the run; None where there was none.
        """
        run = self.attempt(label, train or (lambda: self._trainer.train(problem)))
        if run is None:
            return None
        expected = [problem.whole(samples) for samples in problem.windows()]
        self.compare(label, run.gradients, expected, within=within)
        return run

    def compare(self, label: str, got: list[Gradient], expected: list[Gradient], *, within: float = EXACT) -> None:
        """The worst step of a run against its references."""
        missing: Gradient = [None] * len(expected[0])
        padded = got + [missing] * (len(expected) - len(got))
        pairs = [difference(gradient, reference) for gradient, reference in zip(padded, expected)]
        error, ratio = max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        text = "" if len(got) == len(expected) else f"{len(got)} of {len(expected)} steps"
        self.error(label, error, ratio, within=within, ok=len(got) == len(expected), text=text)

    def error(
        self, label: str, error: float, ratio: float | None = None, *, within: float, ok: bool = True, text: str = ""
    ) -> None:
        """A relative error; autoaccum's must be at most `within`."""
        passed = ok and error <= within
        if math.isfinite(error):
            self._write(label, "error", passed, error=error, ratio=ratio, text=text)
        else:
            shown = "NaN" if math.isnan(error) else "infinite"
            self._write(label, "verdict", passed, text=", ".join(filter(None, (shown, text))))
        if self._trainer.ours:
            assert passed, f"{label}: off by {error:.3g} (ratio {ratio}), more than {within:g}; {text or 'every step'}"

    def verdict(self, label: str, ok: bool, text: str) -> None:
        """Something other than a gradient: a count, a refusal, a repetition; autoaccum's must be right."""
        self._write(label, "verdict", ok, text=text)
        if self._trainer.ours:
            assert ok, f"{label}: {text}"

    def attempt(self, label: str, work: Callable[[], Any]) -> Any:
        """The result of `work`; None where a peer raised, which is written down."""
        if self._trainer.ours:
            return work()
        try:
            return work()
        except NotOffered as reason:
            self._write(label, "not offered", False, text="n/a", detail=str(reason))
        except TimeoutError as error:
            self._write(label, "raised", False, text="hung", detail=str(error))
        except Exception as error:  # whatever a peer raises is its figure, and must not fail our tests
            first = " ".join(str(error).split("\n", maxsplit=1)[0].split())
            self._write(label, "raised", False, text=f"raised {type(error).__name__}", detail=first[:200])
        return None

    def not_offered(self, label: str, reason: str) -> None:
        """The trainer has nothing for this."""
        if self._trainer.ours:
            pytest.skip(reason)
        self._write(label, "not offered", False, text="n/a", detail=reason)

    def _write(self, label: str, outcome: str, ok: bool, **more: Any) -> None:
        figure: Figure = {
            "row": self._row, "title": self._title, "label": label, "trainer": self._trainer.name, "outcome": outcome,
            "error": None, "ratio": None, "ok": ok, "text": "", "detail": "", **more,
        }  # fmt: skip
        self._record(PROPERTY, figure)
