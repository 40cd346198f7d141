"""A run's checkpoints: when one is taken, what of the run goes into it, and where a start goes on."""

from concurrent.futures import ThreadPoolExecutor

import torch

from sslr1 import distributed, puzzles
from sslr1.model.folder import base_of
from sslr1.runs import checkpoint

# The step whose checkpoint holds the reference of loss.kl_coef: the same weights at every start, bit for bit
REFERENCE = 0


class Checkpointer:
    """Takes a session's checkpoints and goes on from them. records: files that are flushed before a checkpoint
    counts."""

    def __init__(self, session, learner, records):
        self.session, self.learner, self.records = session, learner, records
        self.folder = session.folder / "checkpoints"
        self.saved = None  # the step of the last one
        self._writer, self._group = Background(), distributed.another_group()
        asked = session.config.checkpoint.background
        self._background = session.world.device.type == "cuda" if asked is None else asked

    def resume(self):
        """Fill the learner and the sampler from the newest one. Returns (its path, the state that was saved, what of
        the means that it was made by is another now), or None where there is none. All ranks must call it."""
        if self.session.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        path = checkpoint.newest(self.folder)
        distributed.barrier()
        if path is None:
            return None
        state = checkpoint.load(path, learner=self.learner)
        self.session.weights.refresh(self.session.policy)
        self.saved = state["step"]
        before, now = state.get("made_by", {}), self._made_by()
        return path, state, [f"{k} {before.get(k)} → {v}" for k, v in now.items() if before.get(k) != v]

    def save(self, step, best_step, state) -> None:
        """state: the run's, JSON-able. All ranks must call it. The newest ones are kept, and the best one, and the
        reference's."""
        session, c = self.session, self.session.config
        self.wait()  # a snapshot clears away what lies there unfinished
        snapshot = checkpoint.Snapshot(
            self.folder,
            step,
            learner=self.learner,
            sampler=session.weights.model,
            tokenizer=session.tokenizer,
            source=base_of(session.model_path),
            world=session.world,
            keep=c.checkpoint.keep,
            also=[each for each in (best_step, REFERENCE if c.loss.kl_coef else None) if each is not None],
            trainer={"step": step, **state, "made_by": self._made_by()},
            records=self.records,
            group=self._group,
            copy=self._background,
        )
        self._writer.put(snapshot.write)
        if not self._background:
            self.wait()
        self.saved = step

    @property
    def reference(self):
        """The Hugging Face folder, or the adapter, of loss.kl_coef's reference."""
        return self.folder / f"step-{REFERENCE:06d}" / "hf"

    def failed(self) -> bool:
        return self._writer.failed()

    def wait(self) -> None:
        """Until what is under way is written. Raises what writing it raised."""
        self._writer.wait()

    def close(self) -> None:
        """Until what is under way is written or has failed."""
        self._writer.close()

    def _made_by(self) -> dict:
        """What a checkpoint's numbers owe their last bits to, beside the settings."""
        world = self.session.world
        means = {"ranks": world.size, "threads": torch.get_num_threads(), "device": world.device.type}
        means |= {"dtype": str(self.session.spec.dtype), "decoder": self.session.images.store.decoder.backend}
        means |= {"puzzles": puzzles.RULES}
        return checkpoint.versions() | means


class Background:
    """Writes snapshots on a thread while training goes on, one at a time."""

    def __init__(self):
        self._worker, self._writing = ThreadPoolExecutor(1, "checkpoint"), None

    def put(self, write) -> None:
        """Start writing. Waits for, and raises the error of, the one before."""
        self.wait()
        self._writing = self._worker.submit(write)

    def failed(self) -> bool:
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until what was put is written. Raises what writing it raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Until what was put is written or has failed."""
        self._worker.shutdown()
