"""When a run's report is written, and what becomes of one that can't be."""

from types import SimpleNamespace

import pytest

from sslr1 import config
from sslr1.run import Run
from sslr1.runs import records
from sslr1.runs.recorder import Recorder

CONFIG = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "log": {"tensorboard": False}})


@pytest.fixture
def recorder(tmp_path):
    written = []
    one = Recorder(tmp_path, True, lambda folder, going: written.append((folder, going)))
    one.written = written
    one.begin(None, CONFIG)
    return one


def test_a_report_is_written_no_oftener_than_asked(recorder, tmp_path):
    recorder.report(1, at_least_every_s=1e6)
    assert recorder.written == []
    recorder.report(2)
    assert recorder.written == [(tmp_path, True)]


def test_the_end_has_a_report_of_its_own(recorder, monkeypatch):
    """A run that was told to stop may be far from its last evaluation, and the page before says that it goes on."""
    monkeypatch.setattr(records, "final_table", lambda *_: "a table")
    recorder.report(7)
    recorder.end(7, CONFIG, ["a line"])
    recorder.stopped()
    assert [going for _, going in recorder.written] == [True, False]


def test_whatever_ends_a_run_its_report_says_so(recorder):
    recorder.stopped()
    assert recorder.written == []  # there was none yet
    recorder.report(3)
    recorder.stopped()
    assert [going for _, going in recorder.written] == [True, False]


def test_a_report_that_fails_is_said(tmp_path, capsys):
    def fails(folder, going):
        raise OSError("no room")

    recorder = Recorder(tmp_path, True, fails)
    recorder.report(3)
    assert capsys.readouterr().out == "step 3: report.html is not up to date (OSError: no room)\n"


def test_other_ranks_write_nothing(tmp_path):
    recorder = Recorder(tmp_path, False, lambda folder, going: pytest.fail("a report"))
    recorder.write_config("x")
    recorder.begin(None, CONFIG)
    recorder.log({"step": 1}, {"rotation": "01"})
    recorder.report(1)
    recorder.end(1, CONFIG, [])
    assert list(tmp_path.iterdir()) == []


def test_of_equal_evaluations_the_later_is_best(recorder):
    """So that an export takes what was trained longest, not the warm-up's model."""
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "puzzles": {"mixture": {"rotation": 1}}})
    run = SimpleNamespace(config=settings, recorder=recorder, best=-1.0, best_step=None)
    found = []
    for run.step, exact in enumerate((0.25, 0.5, 0.5, 0.25)):
        run.line, run.evaluator = {}, SimpleNamespace(run=lambda exact=exact: ({"eval/rotation/exact": exact}, {}))
        Run.evaluate(run)
        found.append((run.best, run.best_step))
    assert found == [(0.25, 0), (0.5, 1), (0.5, 2), (0.5, 2)]
