"""Where metrics go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases if asked."""

import secrets
from numbers import Number
from pathlib import Path

from sslr1.errors import UserError


def find_wandb(project):
    """The package wandb, or None if no project is given: it is imported for nobody else. Raises UserError if it isn't
    installed."""
    if project is None:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb is {project!r}, and the package wandb is not installed: pip install wandb, or leave log.wandb "
            "out"
        ) from None
    return wandb


class Trackers:
    """Those of one run folder, on rank 0. done: the step that the run goes on from, None for one that begins; config:
    the configuration as a dict. What a run that was killed wrote beyond that step is purged from TensorBoard; Weights &
    Biases gets it again, with `step` as its axis and the same values."""

    def __init__(self, folder, done, config):
        folder, log = Path(folder), config["log"]
        self._board = self._run = None
        if log["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=0 if done is None else done + 1)
        if wandb := find_wandb(log["wandb"]):
            named = folder / "wandb-id.txt"
            if not named.exists():
                named.write_text(secrets.token_hex(8))
            named_run = {"project": log["wandb"], "name": folder.name, "id": named.read_text(), "resume": "allow"}
            try:
                self._run = wandb.init(**named_run, dir=str(folder), config=config)
            except wandb.Error as error:  # no key, no network
                raise UserError(f"log.wandb is {log['wandb']!r}: {error}") from None
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def write(self, record: dict) -> None:
        """A step's numbers by name, `step` among them."""
        if self._board:
            for name, value in record.items():
                if name != "step" and isinstance(value, Number):
                    self._board.add_scalar(name, value, record["step"])
            self._board.flush()
        if self._run:
            self._run.log(record)

    def close(self):
        if self._board:
            self._board.close()
        if self._run:
            self._run.finish()
