"""Events and sinks: everyone hears everything; a full disk costs lines and not the training."""

import json
from pathlib import Path

import pytest

from autoaccum.training.events import (
    EpochEnded,
    Event,
    Events,
    JsonlSink,
    Noted,
    StepTaken,
    StopTraining,
    TrainingWarning,
    WindowReplayed,
)
from autoaccum.window.record import StepRecord

RECORD = StepRecord(
    step=1, epoch=0, loss=0.5, lr=1e-3, grad_norm=None, samples=16, micro_batches=2, seconds=0.1, samples_per_second=160
)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def test_every_event_has_a_name_of_its_own_and_plain_values():
    names = [kind.name for kind in Event.__subclasses__()]
    assert len(set(names)) == len(names)
    assert StepTaken(RECORD).to_dict() == {"event": "step", "record": RECORD.to_dict()}
    assert Noted("text").to_dict() == {"event": "note", "text": "text"}
    json.dumps(WindowReplayed(1, 2, 3, "text").to_dict())


def test_all_listeners_hear_an_event_even_where_one_asks_for_the_end():
    heard = []

    def stop(event):
        raise StopTraining("enough")

    events = Events([stop, heard.append])
    events.add(heard.append)
    events.tell(Noted("a"))
    assert heard == [Noted("a")] * 2
    assert events.stop == "enough"


def test_a_warning_is_an_event_and_a_python_warning():
    heard = []
    events = Events([heard.append])
    with pytest.warns(TrainingWarning, match="memory"):
        events.warn("memory")
    with pytest.warns(TrainingWarning, match="again"):
        events.warn("again", WindowReplayed(1, 2, 3, "again"))
    assert heard == [Noted("memory"), WindowReplayed(1, 2, 3, "again")]


def test_a_sink_appends_and_may_be_closed_in_between(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    sink(Noted("a"))
    sink.close()
    sink(StepTaken(RECORD))
    sink.close()
    sink.close()
    assert [line["event"] for line in lines(tmp_path / "deep" / "metrics.jsonl")] == ["note", "step"]


def test_a_sink_can_be_cut_back_to_where_it_was(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink(Noted("a"))
    position = sink.position()
    sink(StepTaken(RECORD))
    sink.cut(position)
    sink(Noted("b"))
    sink.close()
    assert [line["text"] for line in lines(tmp_path / "metrics.jsonl")] == ["a", "b"]
    sink.cut(10**6)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "note", "te')
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink(Noted("a"))
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["text"] == "a"


def test_what_is_not_finite_is_null_since_json_has_no_word_for_it(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink(EpochEnded(1, 2, {"loss": float("nan"), "accuracy": 0.5}))
    sink.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["evaluation"] == {"loss": None, "accuracy": 0.5}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is what stands for a full disk here")
def test_a_full_disk_is_said_once_and_remembered(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.warns(TrainingWarning, match="No space left") as said:
        [sink(Noted("a")) for _ in range(5)]
    sink.close()
    assert len(said) == 1
    assert "No space left" in sink.failed
