"""What a run writes for people: metrics, samples, trackers, a report, and lines on the terminal."""

import time
from pathlib import Path

from sslr1.config import levels, shares
from sslr1.files import write_whole
from sslr1.runs import records
from sslr1.runs.progress import Progress
from sslr1.runs.samples import Samples
from sslr1.runs.trackers import Trackers


class Recorder:
    """Of one run folder. All ranks hold one; only the main one writes. write_report(folder): see
    `report.page.write`."""

    def __init__(self, folder, main, write_report):
        self.folder, self.main, self._write_report = Path(folder), main, write_report
        self.metrics = records.JsonLines(self.folder / "metrics.jsonl")
        self.samples = Samples(self.folder)
        self.answers = records.JsonLines(self.folder / records.ANSWERS)
        self.progress = Progress(main)
        self.began = self._reported_at = time.monotonic()
        self._reported = self._trackers = None
        self._going = False  # what the report on disk says of the run

    @property
    def files(self) -> tuple:
        """Whose lines up to its step a checkpoint counts on."""
        return self.metrics.path, self.samples.lines.path, self.answers.path

    def write_config(self, text) -> None:
        if self.main:
            write_whole(self.folder / "config.yaml", text)

    def begin(self, done, config) -> None:
        """done: the step that the run goes on from, None for one that begins. What lies beyond it is dropped."""
        if self.main:
            for lines in (self.metrics, self.samples, self.answers):
                lines.cut(-1 if done is None else done)
            self._trackers = Trackers(self.folder, done, config.model_dump(mode="json"))

    def log(self, line: dict, answers: dict) -> None:
        """A step's numbers by name, `step` among them; what a held-out evaluation found of each puzzle, empty where
        there was none."""
        if self.main:
            self.metrics.write(line)
            self._trackers.write(line)
            if answers:
                self.answers.write({"step": line["step"], **answers})

    def say(self, *lines) -> None:
        for line in lines:
            self.progress.say(line)

    def report(self, step, at_least_every_s=0.0, going=True) -> None:
        """Write the report, unless it was written less than so many seconds ago. One that can't be written is said, and
        ends no run. going: the run goes on, so that the page looks for a newer one."""
        if time.monotonic() - self._reported_at <= at_least_every_s:
            return
        self._reported, self._reported_at, self._going = step, time.monotonic(), going
        if self.main:
            try:
                self._write_report(self.folder, going=going)
            except Exception as error:
                self.say(f"step {step}: report.html is not up to date ({type(error).__name__}: {error})")

    def stopped(self) -> None:
        """Whatever ended the run: a report that says that it goes on is written again."""
        if self._going:
            self.report(self._reported, going=False)

    def end(self, step, config, lines) -> None:
        """The last report, the trackers' ends, the table and the closing lines."""
        self.report(step, going=False)
        self.say(*lines)
        if self.main:
            self._trackers.close()
            settings, warmup = config.model_dump(mode="json"), config.train.warmup.steps
            asked = shares(settings), levels(settings)
            self.progress.table(records.final_table(self.metrics.read(), *asked, warmup))
            self.say(
                f"{step} of {config.train.steps} steps in {self.folder}, {time.monotonic() - self.began:.0f} s in this "
                "process; report.html there shows what it learnt"
            )
