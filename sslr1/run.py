"""A run: what stands around the training loop. Where it begins, what it records, when it evaluates and checkpoints, how it ends."""

import resource
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import torch

from sslr1 import config, distributed, ops, puzzles
from sslr1.data import BadImages
from sslr1.errors import UserError
from sslr1.evaluate.held_out import Evaluator
from sslr1.files import write_whole
from sslr1.learner import Learner
from sslr1.model import cost
from sslr1.puzzles.curriculum import Curriculum
from sslr1.report import page as report
from sslr1.runs import checkpoint, metrics, records
from sslr1.runs.alarms import Alarms
from sslr1.runs.progress import Progress
from sslr1.runs.samples import Samples
from sslr1.runs.trackers import Trackers
from sslr1.setup import interrupt
from sslr1.sums import plain_sum
from sslr1.warmup import warm_up

# The step whose checkpoint holds the reference of loss.kl_coef: the same weights at every start, bit for bit
REFERENCE = 0
SKIPS = 10  # steps in a row without a finite gradient that end a run
STOP, INTERRUPT, FAILED = 1, 2, 3  # what a rank tells the others between two steps, the gravest last
ENOUGH_IMAGES = 64  # before data.max_bad is held against them


class Run:
    """A run's learner, its curriculum, its records, its clock, and when to evaluate and to checkpoint."""

    def __init__(self, built):
        self.built, self.config, self.world = built, built.config, built.world
        c = self.config
        self.learner = Learner(
            built.policy,
            built.world,
            optim=c.optim,
            loss=c.loss,
            temperature=c.rollout.temperature,
            max_tokens=c.rollout.max_tokens,
            token_budget=c.train.token_budget,
            steps=c.train.steps,
            max_logp_gap=c.rollout.max_logp_gap,
        )
        self.curriculum = Curriculum(
            c.puzzles.curriculum,
            {name: puzzles.LEVELS[name] for name in c.puzzles.mixture},
            c.puzzles.levels,
            c.train.seed,
        )
        self.alarms = Alarms(c.puzzles.rule)
        self.sampling = dict(
            group_size=c.rollout.group_size,
            seed=c.train.seed,
            temperature=c.rollout.temperature,
            top_p=c.rollout.top_p,
            top_k=c.rollout.top_k,
        )
        self.checkpoints = built.folder / "checkpoints"
        self.writer, self.writers_group = checkpoint.Background(), distributed.another_group()
        self.metrics = records.JsonLines(built.folder / "metrics.jsonl")
        self.samples = Samples(built.folder)
        self.trackers = None  # on rank 0, from `begin` on
        self.progress = Progress(built.world.main)
        stores = {"": built.images.store} | ({f"{c.eval.path}/": built.evaluation.store} if c.eval.path else {})
        self.bad_images, self.images = BadImages(built.folder, stores, built.world), [0, 0]  # asked for, of which bad
        self.step, self.saved, self.reported, self.best, self.best_step = 0, None, None, -1.0, None
        self.times, self.signalled, self.interrupted = {}, 0, False
        self.began = self.report_time = time.monotonic()

    def _on_signal(self, number, _):
        self.signalled = max(self.signalled, INTERRUPT if number == signal.SIGINT else STOP)
        if number == signal.SIGINT:
            interrupt.next_ends()
            words = "interrupted: the step is finished and saved; once more leaves at once"
            threading.Thread(target=self.progress.say, args=(words,)).start()  # this one may be writing just now

    def __enter__(self):
        ours = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            ours.append(signal.SIGINT)
        self._handled = {name: signal.signal(name, self._on_signal) for name in ours}
        return self

    def __exit__(self, *_):
        self.writer.close()  # whatever ended the run: a checkpoint that is under way may still become whole
        self.bad_images.save()  # whatever ended the run
        for name, handler in self._handled.items():
            if not self.signalled:  # else what was said of the next one holds
                signal.signal(name, handler)

    def score(self, answer, sample):
        """By its text; nothing for a completion that was cut off, or nothing would ever reward stopping."""
        cut_off = sample.finish == "length" and self.config.rollout.truncated == "zero"
        return self.built.score(answer, "" if cut_off else sample.text)

    def learnable(self, groups) -> list:
        """The groups as the loss sees them: under rollout.truncated=mask, completions that were cut off have no tokens there. Their
        rewards still count in their groups' means."""
        if self.config.rollout.truncated != "mask":
            return groups
        empty = {"tokens": torch.zeros(0, dtype=torch.int64), "logprobs": torch.zeros(0)}
        return [
            replace(group, samples=[replace(s, **empty) if s.finish == "length" else s for s in group.samples])
            for group in groups
        ]

    @contextmanager
    def clock(self, phase):
        start = time.perf_counter()
        yield
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start

    def begin(self) -> int:
        """Go on from the newest checkpoint, or warm up, evaluate and write the first one. Returns the next step."""
        if self.world.main:
            write_whole(self.built.folder / "config.yaml", config.dump(self.config))
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        for line in (self.built.summary(), *self.built.not_read()):
            self.progress.say(line)
        found = checkpoint.newest(self.checkpoints)
        distributed.barrier()
        if found:
            state = checkpoint.load(found, learner=self.learner)
            self.built.weights.refresh(self.built.policy)
            self.step = self.saved = state["step"]
            self.best, self.best_step = state["best"], state["best_step"]
            self.curriculum.load(state["curriculum"])
            self.alarms.load(state["alarms"])
            self.images = state["images"]
            before, now = state.get("made_by", {}), self._made_by()
            changed = [f"{k} {before.get(k)} → {v}" for k, v in now.items() if before.get(k) != v]
            if changed:
                self.progress.say(
                    f"warning: {found} was made by other means ({', '.join(changed)}): expect other rounding"
                )
            self.progress.say(
                f"going on from {found}"
                if self.step < self.config.train.steps
                else f"{self.built.folder} has already made its {self.step} steps; raise train.steps to go on, or choose another log.name"
            )
        if self.world.main:
            done = self.step if found else None
            self.metrics.cut(-1 if done is None else done)
            self.samples.cut(-1 if done is None else done)
            self.trackers = Trackers(self.built.folder, done, self.config.model_dump(mode="json"))
        self.evaluator = Evaluator(self.built)
        if not found:
            if self.config.train.warmup.steps and not warm_up(self.built, self.progress, self.stopping):
                self.progress.say("stopped during the warm-up, of which nothing is kept")
                raise KeyboardInterrupt("said") if self.interrupted else SystemExit
            self._evaluate({})
            self._checkpoint()
            self._report()
        self.bad_images.update()
        if self.config.loss.kl_coef:
            self.writer.wait()
            self.learner.set_reference(self.built.reference(self.checkpoints / f"step-{REFERENCE:06d}" / "hf"))
        self.progress.start("GRPO", self.config.train.steps, self.step)
        return self.step

    def record(self, step, batch, drawn, trained, learned):
        """Log a finished step and tell the curriculum of it; evaluate and checkpoint where it is time. batch, drawn:
        the first puzzle of every slot, which nearly all metrics count; trained: what the learner was given."""
        c = self.config
        self.step = step
        totals = metrics.StepTotals.gather(
            batch.puzzles,
            drawn.scores,
            drawn.groups,
            c.puzzles.mixture,
            c.puzzles.rule,
            self.world.device,
            trained.rewards,
            trained.resampled,
            (*batch.images_asked(), self.bad_images.untold()),
        )
        self._watch_images(totals)
        taught = self._teach(batch.step, totals)
        speed = {f"timing_s/{phase}": seconds for phase, seconds in self.times.items()}
        speed["timing_s/step"] = plain_sum(self.times.values())
        speed["timing_s/elapsed"] = time.monotonic() - self.began  # since this process started its run
        speed["perf/tokens_per_second"] = learned.pop("tokens") / speed["timing_s/step"]
        speed["perf/learner_tokens_per_second"] = learned.pop("computed") / self.times["learner"]
        speed["perf/learner_effective_tokens_per_second"] = learned.pop("repeated") / self.times["learner"]
        rate = learned.pop("flops") / self.times["learner"] / self.world.size
        speed["perf/learner_tflops"] = rate / 1e12  # a rank
        if self.world.device.type == "cuda":
            peak = cost.peak_flops(torch.cuda.get_device_name(self.world.device))
            if peak:
                speed["perf/mfu"] = rate / peak
            speed["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        speed["perf/max_host_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.times = {}
        lost = self.learner.skipped_in_a_row >= SKIPS
        advantages = ops.advantages(drawn.rewards, c.loss.advantage, learned.pop("step_reward_std"))
        shown = batch.prompts[: None if lost else c.log.samples]
        if self.world.main and shown:
            self.samples.write(step, batch.puzzles, shown, drawn.groups, drawn.scores, advantages)
        resampled = {"rollout/resampled": totals.overall["resampled"]} if c.rollout.resample else {}
        line = {"step": step, **totals.metrics(), **resampled, **taught, **learned, **speed}
        line |= self._watch(line)
        self.progress.show(step, {k: line[k] for k in ("reward", "entropy", "timing_s/step")})
        if lost:
            self._log(line)
            self._report()
            words = f"{SKIPS} steps in a row, to step {step}, had a gradient that is not finite and were skipped; the samples "
            words += f"of the last are in {self.samples.lines.path}. Checkpoints are whole: go on with other settings, e.g. a lower "
            raise UserError(words + "optim.lr, and checkpoint.allow_change=true" if self.world.main else "")
        evaluated = step % c.eval.every == 0 or step == c.train.steps
        if evaluated:
            self._evaluate(line)
        else:
            self._log(line)
        if step % c.checkpoint.every == 0 or step == self.best_step:
            self._checkpoint()
        if evaluated or time.monotonic() - self.report_time > c.log.report_every_s:
            self._report()

    def _log(self, line):
        if self.world.main:
            self.metrics.write(line)
            self.trackers.write(line)

    def _teach(self, step, totals) -> dict:
        """Update the curriculum; say what moved. Returns its metrics, with a mark in the step of an alarm."""
        events = self.curriculum.update(step, totals.levels)
        for event in events:
            self.progress.say(f"step {self.step}: {event}")
        alarms = {f"curriculum/{event.puzzle}/plateau": 1.0 for event in events if event.kind == "plateau"}
        return {**self.curriculum.metrics(), **alarms}

    def _watch(self, line) -> dict:
        """Say which alarms a step raises; returns their marks."""
        raised = self.alarms.update(*(line[name] for name in ("reward", "format", "entropy")))
        for alarm in raised:
            self.progress.say(f"step {self.step}: {alarm}")
        return {f"alarm/{alarm.kind}": 1.0 for alarm in raised}

    def stopping(self) -> bool:
        """Whether any rank was told to stop (SIGTERM, SIGUSR1, Ctrl-C). Raises what went wrong with a checkpoint in the background."""
        flag = torch.tensor(FAILED if self.writer.failed() else self.signalled, device=self.world.device)
        gravest = int(distributed.all_reduce(flag, "max"))
        if gravest == FAILED:
            self.writer.wait()
        self.interrupted = gravest == self.signalled == INTERRUPT  # where others had it, as after SIGTERM
        return gravest > 0

    def end(self):
        """Save what is not saved yet, and say what was done. Raises KeyboardInterrupt where Ctrl-C has stopped the run."""
        if self.saved != self.step:
            self._checkpoint()
        self.writer.wait()
        self.bad_images.update()
        if self.reported != self.step:
            self._report()
        for line in (*self.built.not_read(), *self.bad_images.summary()):
            self.progress.say(line)
        if self.world.main:
            self.trackers.close()
            self.progress.table(
                records.final_table(self.metrics.read(), self.config.puzzles.mixture, self.config.puzzles.levels)
            )
            self.progress.say(
                f"{self.step} of {self.config.train.steps} steps in {self.built.folder}, "
                f"{time.monotonic() - self.began:.0f} s in this process; report.html there shows what it learnt"
            )
        if self.interrupted:
            raise KeyboardInterrupt("said")

    def _evaluate(self, line):
        found = self.evaluator.run()
        mean = plain_sum(found[f"eval/{name}/exact"] for name in self.config.puzzles.mixture) / len(
            self.config.puzzles.mixture
        )
        if mean > self.best:
            self.best, self.best_step = mean, self.step
        self._log({"step": self.step, **line, **found})
        self.progress.say(
            f"step {self.step} held out: "
            + ", ".join(f"{name} {found[f'eval/{name}/exact']:.1%}" for name in self.config.puzzles.mixture)
        )

    def _watch_images(self, totals):
        """List bad images that are new, and end the run if they are too many. Counted are the images that slots asked for,
        which are the same ones whatever the ranks, and resuming goes on counting."""
        if totals.overall["untold"]:
            self.bad_images.update()
        self.images = [so_far + int(totals.overall[key]) for so_far, key in zip(self.images, ("images", "bad"))]
        asked, bad = self.images
        limit = self.config.data.max_bad
        if asked >= ENOUGH_IMAGES and bad > limit * asked:
            words = f"{bad} of the {asked} images that puzzles asked for were bad, more than data.max_bad {limit:.0%}: "
            raise UserError(f"{words}{self.bad_images}" if self.world.main else "")

    def _report(self):
        """A report that can't be written is said, and ends no run."""
        self.reported, self.report_time = self.step, time.monotonic()
        if self.world.main:
            try:
                report.write(self.built.folder)
            except Exception as error:
                self.progress.say(f"step {self.step}: report.html is not up to date ({type(error).__name__}: {error})")

    def _checkpoint(self):
        background = self.config.checkpoint.background
        if background is None:
            background = self.world.device.type == "cuda"
        self.writer.wait()  # a snapshot clears away what lies there unfinished
        write = checkpoint.snapshot(
            self.checkpoints,
            self.step,
            learner=self.learner,
            sampler=self.built.weights.model,
            tokenizer=self.built.tokenizer,
            source=self.built.model_path,
            world=self.world,
            keep=self.config.checkpoint.keep,
            also=[
                step for step in (self.best_step, REFERENCE if self.config.loss.kl_coef else None) if step is not None
            ],
            trainer={
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "curriculum": self.curriculum.state(),
                "alarms": self.alarms.state(),
                "made_by": self._made_by(),
                "images": self.images,
            },
            records=(self.metrics.path, self.samples.lines.path),
            group=self.writers_group,
            copy=background,
        )
        self.writer.put(write)
        if not background:
            self.writer.wait()
        self.saved = self.step

    def _made_by(self) -> dict:
        """What a checkpoint's numbers owe their last bits to, beside the settings."""
        means = {"ranks": self.world.size, "threads": torch.get_num_threads(), "device": self.world.device.type}
        means |= {"dtype": str(self.built.spec.dtype), "decoder": self.built.images.store.decoder.backend}
        return checkpoint.versions() | means
