"""A user's own callback and early stopping, written against the public names alone, for mypy --strict to read."""

import autoaccum
from autoaccum import events


def stop_early(event: events.Event) -> None:
    if isinstance(event, events.EpochEnded) and event.evaluation is not None and event.evaluation["loss"] < 0.1:
        raise autoaccum.StopTraining("low enough")
    if isinstance(event, events.StepTaken) and event.record.loss > 1e3:
        raise autoaccum.StopTraining


listeners: list[events.Listener] = [stop_early, autoaccum.JsonlSink("a.jsonl")]
sink: events.Sink = autoaccum.TensorBoardSink("folder")
name: str = events.StepTaken.name
