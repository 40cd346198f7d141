"""When a run's report is written, and what becomes of one that can't be."""

import pytest

from sslr1 import config
from sslr1.runs import records
from sslr1.runs.recorder import Recorder

CONFIG = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "log": {"tensorboard": False}})


@pytest.fixture
def recorder(tmp_path):
    written = []
    one = Recorder(tmp_path, True, lambda folder: written.append(folder))
    one.written = written
    one.begin(None, CONFIG)
    return one


def test_a_report_is_written_no_oftener_than_asked(recorder, tmp_path):
    recorder.report(1, at_least_every_s=1e6)
    assert recorder.written == []
    recorder.report(2)
    assert recorder.written == [tmp_path]


@pytest.mark.parametrize("last, reports", [(7, 1), (6, 2)])
def test_the_end_has_a_report_of_its_step(recorder, monkeypatch, last, reports):
    """A run that was told to stop may be far from its last evaluation."""
    monkeypatch.setattr(records, "final_table", lambda *_: "a table")
    recorder.report(last)
    recorder.end(7, CONFIG, ["a line"])
    assert len(recorder.written) == reports


def test_a_report_that_fails_is_said(tmp_path, capsys):
    def fails(folder):
        raise OSError("no room")

    recorder = Recorder(tmp_path, True, fails)
    recorder.report(3)
    assert capsys.readouterr().out == "step 3: report.html is not up to date (OSError: no room)\n"


def test_other_ranks_write_nothing(tmp_path):
    recorder = Recorder(tmp_path, False, lambda folder: pytest.fail("a report"))
    recorder.write_config("x")
    recorder.begin(None, CONFIG)
    recorder.log({"step": 1}, {"rotation": "01"})
    recorder.report(1)
    recorder.end(1, CONFIG, [])
    assert list(tmp_path.iterdir()) == []
