"""A run: what stands around the training loop. Where it begins, what it records, when it evaluates and checkpoints, how
it ends."""

import time
from contextlib import contextmanager

import torch

from sslr1 import config, distributed, ops, puzzles
from sslr1.data import BadImages
from sslr1.errors import UserError
from sslr1.evaluate.held_out import Evaluator
from sslr1.learner import Learner
from sslr1.model import cost
from sslr1.puzzles.curriculum import Curriculum
from sslr1.report import page
from sslr1.runs import alarms
from sslr1.runs.checkpointer import Checkpointer
from sslr1.runs.metrics import StepTotals
from sslr1.runs.recorder import Recorder
from sslr1.runs.usage import Usage
from sslr1.runs.watch import SKIPS, Watch
from sslr1.setup.interrupt import INTERRUPT, Signals
from sslr1.sums import plain_sum
from sslr1.warmup import warm_up

FAILED = INTERRUPT + 1  # what a rank tells the others between two steps, beside what signals say, and graver


class Clock:
    """Seconds of a step's phases."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict:
        """Those since the last time."""
        taken, self.seconds = self.seconds, {}
        return taken


class Run:
    """A session's learner and curriculum, and what keeps its records, its checkpoints and its watch."""

    def __init__(self, session):
        c, world = session.config, session.world
        self.session, self.config, self.world = session, c, world
        self.settings = c.model_dump(mode="json")  # as config.yaml holds them
        self.learner = Learner(
            session.policy,
            world,
            optim=c.optim,
            loss=c.loss,
            temperature=c.rollout.temperature,
            max_tokens=c.rollout.max_tokens,
            token_budget=c.train.token_budget,
            steps=c.train.steps,
            max_logp_gap=c.rollout.max_logp_gap,
            spec=session.spec,
            keep_seen=session.keep_seen,
        )
        session.engine.expect(c.rollout.prompts // world.size, c.rollout.group_size, session.longest)
        levels = {name: puzzles.LEVELS.get(name, (level,)) for name, level in session.levels.items()}
        self.curriculum = Curriculum(c.puzzles.curriculum, levels, session.levels, c.train.seed)
        self.recorder = Recorder(session.folder, world.main, page.write)
        self.checkpoints = Checkpointer(session, self.learner, self.recorder.files)
        stores = {"": session.images.store} | (
            {f"{session.evaluation.store.folder.root}/": session.evaluation.store} if c.eval.path else {}
        )
        stores |= {f"tasks.{name}: ": task for name, task in session.tasks.items()}
        self.watch = Watch(c, BadImages(session.folder, stores, world), world.main)
        self.signals = Signals(self.recorder.say)
        self.clock, self.usage = Clock(), Usage()
        self.step, self.best, self.best_step, self.interrupted = 0, -1.0, None, False
        self.line, self.answers = {"step": 0}, {}  # what is written of a step

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *error):
        self.checkpoints.close()  # whatever ended the run: a checkpoint that is under way may still become whole
        self.watch.bad_images.save()
        self.recorder.stopped()
        self.signals.__exit__(*error)

    def state(self) -> dict:
        """Everything that later steps depend on beside weights and moments, JSON-able."""
        best = {"best": self.best, "best_step": self.best_step}
        return best | {"curriculum": self.curriculum.state()} | self.watch.state()

    def load(self, state: dict) -> None:
        """Go on from `state()` after its step."""
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.curriculum.load(state["curriculum"])
        self.watch.load(state)

    def begin(self) -> int:
        """Go on from the newest checkpoint, or warm up, evaluate and write the first one. Returns the next step."""
        c, say = self.config, self.recorder.say
        self.recorder.write_config(config.dump(c))
        say(self.session.summary(), *self.session.not_read())
        found = self.checkpoints.resume()
        if found:
            path, state, changed = found
            self.load(state)
            if changed:
                say(f"warning: {path} was made by other means ({', '.join(changed)}): expect other rounding")
            finished = f"{self.session.folder} has already made its {self.step} steps; raise train.steps to go on, "
            finished += "or choose another log.name"
            say(f"going on from {path}" if self.step < c.train.steps else finished)
        self.recorder.begin(self.step if found else None, c)
        self.evaluator = Evaluator(self.session)
        if not found:
            if c.train.warmup.steps and not warm_up(self.session, self.recorder.progress, self.stopping):
                say("stopped during the warm-up, of which nothing is kept")
                raise KeyboardInterrupt("said") if self.interrupted else SystemExit
            self.evaluate()
            self.log(report=True)
            self.checkpoint()
        self.watch.bad_images.update()
        if c.loss.kl_coef:
            self.checkpoints.wait()
            self.learner.set_reference(self.session.reference(self.checkpoints.reference))
        self.recorder.progress.start("GRPO", c.train.steps, self.step)
        self.usage.begin()
        return self.step

    def stopping(self) -> bool:
        """Whether any rank was told to stop (SIGTERM, SIGUSR1, Ctrl-C). Raises what went wrong with a checkpoint in the
        background."""
        own = FAILED if self.checkpoints.failed() else self.signals.received
        gravest = int(distributed.all_reduce(torch.full((), own, device=self.world.device), "max"))
        if gravest == FAILED:
            self.checkpoints.wait()
        self.interrupted = gravest == self.signals.received == INTERRUPT  # where others had it, as after SIGTERM
        return gravest > 0

    def check_judges(self) -> None:
        """Raises what a task's function has done wrong on any rank, before anything is learnt from it: the steps so far
        are saved."""
        try:
            self.session.check_judges()
        except UserError:
            if self.checkpoints.saved != self.step:
                self.checkpoint()
            self.checkpoints.wait()
            raise

    def count(self, batch, drawn, trained) -> StepTotals:
        """A step's completions over all ranks. drawn: of the first puzzle of every slot, which nearly all metrics
        count; trained: what the learner was given. Raises UserError if too many images are bad."""
        c = self.config.puzzles
        totals = StepTotals.gather(
            batch.puzzles,
            drawn,
            trained,
            mixture=self.session.levels,
            rule=c.rule,
            device=self.world.device,
            images=(*batch.images_asked(), self.watch.bad_images.untold()),
        )
        self.watch.images(totals)
        return totals

    def record(self, step, batch, drawn, totals, events, learned) -> None:
        """Note a finished step's numbers and samples, and say what is to be said. events: the curriculum's. Raises
        UserError after too many steps without a gradient."""
        c, say = self.config, self.recorder.say
        self.step = step
        for event in events:
            mend = f": {alarms.advice('plateau', self.settings, event.puzzle)}" if event.kind == "plateau" else ""
            say(f"step {step}: {event}{mend}")
        plateaus = {f"curriculum/{event.puzzle}/plateau": 1.0 for event in events if event.kind == "plateau"}
        lost = self.learner.skipped_in_a_row >= SKIPS
        shown = batch.prompts[: None if lost else c.log.samples]
        if self.world.main and shown:
            advantages = ops.advantages(drawn.rewards, c.loss.advantage, learned.reward_std)
            self.recorder.samples.write(step, batch.puzzles, shown, drawn.groups, drawn.scores, advantages)
        line = {"step": step, **totals.metrics()}
        line |= {"rollout/resampled": totals.overall["resampled"]} if c.rollout.resample else {}
        line |= self.curriculum.metrics() | plateaus | learned.metrics | self._speed(learned)
        for kind in self.watch.alarms.update(*(line[name] for name in ("reward", "format", "entropy"))):
            say(f"step {step}: warning: {alarms.MESSAGES[kind]}: {alarms.advice(kind, self.settings)}")
            line[f"alarm/{kind}"] = 1.0
        self.recorder.progress.show(step, {k: line[k] for k in ("reward", "entropy", "timing_s/step")})
        self.line, self.answers = line, {}
        if lost:
            self.log(report=True)
            self.watch.lost(step, self.recorder.samples.lines.path)

    def log(self, report) -> None:
        """Write the step's line, and the report: at once, or if the last is log.report_every_s old."""
        self.recorder.log(self.line, self.answers)
        self.recorder.report(self.step, 0.0 if report else self.config.log.report_every_s)
        self.usage.begin()

    def _speed(self, learned) -> dict:
        seconds = self.clock.take()
        out = {f"timing_s/{phase}": taken for phase, taken in seconds.items()}
        out["timing_s/step"] = plain_sum(seconds.values())
        out["timing_s/elapsed"] = time.monotonic() - self.recorder.began  # since this process started its run
        out["perf/tokens_per_second"] = learned.tokens / out["timing_s/step"]
        out["perf/learner_tokens_per_second"] = learned.computed / seconds["learner"]
        out["perf/learner_effective_tokens_per_second"] = learned.unshared / seconds["learner"]
        rate = learned.flops / seconds["learner"] / self.world.size
        out["perf/learner_tflops"] = rate / 1e12  # a rank
        if self.world.device.type == "cuda":
            peak = cost.peak_flops(torch.cuda.get_device_name(self.world.device))
            if peak:
                out["perf/mfu"] = rate / peak
            out["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return out | self.usage.metrics()

    def evaluate(self) -> None:
        """Answer the held-out puzzles, and add their metrics to the step's line."""
        found, self.answers = self.evaluator.run()
        exact = {key.split("/")[1]: share for key, share in found.items() if key.endswith("/exact")}
        mean = plain_sum(exact.values()) / len(exact)
        if mean >= self.best:  # of equals the one that was trained longer
            self.best, self.best_step = mean, self.step
        self.recorder.say(f"step {self.step} held out: " + ", ".join(f"{name} {x:.1%}" for name, x in exact.items()))
        self.line |= found

    def checkpoint(self) -> None:
        self.checkpoints.save(self.step, self.best_step, self.state())

    def end(self) -> None:
        """Save what is not saved yet, and say what was done. Raises KeyboardInterrupt where Ctrl-C has stopped the
        run."""
        if self.checkpoints.saved != self.step:
            self.checkpoint()
        self.checkpoints.wait()
        bad_images = self.watch.bad_images
        bad_images.update()
        self.recorder.end(self.step, self.config, (*self.session.not_read(), *bad_images.summary()))
        if self.interrupted:
            raise KeyboardInterrupt("said")
