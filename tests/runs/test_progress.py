"""What a run shows on a terminal and in a log."""

import io
import re
from types import SimpleNamespace

from sslr1.runs import progress


class Screen(io.StringIO):
    """A stream that remembers each write."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal, self.writes = terminal, []

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def shown(monkeypatch, terminal, main=True, done=40, **environment):
    """What is written of steps done + 1 to done + 10 of a hundred, one a second, with a remark and the end of the
    phase."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "COLUMNS": "120"} | environment).items():
        monkeypatch.setenv(name, value)
    screen, now = Screen(terminal), [1000.0]
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = progress.Progress(main)
    bar.start("GRPO", 100, done)
    for step in range(done + 1, done + 11):
        now[0] += 1
        bar.show(step, {"reward": 0.5, "timing_s/step": 1.0})
    bar.say("[bold] is no markup")
    now[0] += 10
    bar.show(done + 11, {"reward": 0.75})
    bar.stop()
    return screen


def test_a_log_gets_whole_plain_lines_now_and_then(monkeypatch):
    """Each is one write that ends its line, so that torchrun's prefixes and other ranks' lines don't split it. The time
    left counts the steps of this process only."""
    for environment in ({}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}):
        screen = shown(monkeypatch, False, **environment)
        plain = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in screen.writes if text]
        assert plain == [
            "GRPO 41/100  ETA 0:00:59  reward 0.500  step 1.000\n",
            "[bold] is no markup\n",
            "GRPO 51/100  ETA 0:01:29  reward 0.750\n",  # 11 steps in 20 s, 49 to go
        ]
    assert "\x1b" not in "".join(shown(monkeypatch, False).writes)


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    text = shown(monkeypatch, True).getvalue()
    assert "\x1b[" in text and "51/100" in text and "ETA" in text and "reward 0.750" in text
    assert "GRPO 41/100  ETA" not in text and "[bold] is no markup" in text
    assert "\x1b" not in shown(monkeypatch, True, TERM="dumb").getvalue()


def test_other_ranks_are_silent(monkeypatch):
    assert not any(shown(monkeypatch, terminal, main=False).getvalue() for terminal in (True, False))


def test_clock():
    assert [progress.clock(s) for s in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00:00", "0:01:00", "0:59:59", "1:00:00", "25:01:01"
    ]  # fmt: skip
