"""What a run records: one JSON line a step, some samples, and the tables that are made from them."""

import json
import math
from pathlib import Path

import torch

from sslr1.model import parallel


def rollout_metrics(names, levels, scores, groups, mixture, levels_now, device) -> dict:
    """Metrics of a step's completions over all ranks. scores: a list of `Score` for each of this rank's puzzles."""
    sums = {
        "puzzles": 0.0,
        "completions": 0.0,
        "reward": 0.0,
        "reward_std": 0.0,
        "flat": 0.0,
        "length": 0.0,
        "clipped": 0.0,
        "format": 0.0,
    }
    for name in mixture:
        sums |= {f"{name}/n": 0.0, f"{name}/reward": 0.0, f"{name}/accuracy": 0.0, f"{name}/exact": 0.0}
    for name, group_scores, group in zip(names, scores, groups):
        rewards = torch.tensor([s.reward for s in group_scores], dtype=torch.float64)
        sums["puzzles"] += 1
        sums["completions"] += len(rewards)
        sums["reward"] += rewards.sum().item()
        sums["reward_std"] += rewards.std().item() if len(rewards) > 1 else 0.0
        sums["flat"] += float(rewards.max() == rewards.min())
        sums["length"] += sum(len(s.tokens) for s in group.samples)
        sums["clipped"] += sum(s.finish == "length" for s in group.samples)
        sums["format"] += sum(s.format_ok for s in group_scores)
        sums[f"{name}/n"] += len(rewards)
        sums[f"{name}/reward"] += rewards.sum().item()
        sums[f"{name}/accuracy"] += sum(s.accuracy for s in group_scores)
        sums[f"{name}/exact"] += sum(s.exact for s in group_scores)
    total = dict(
        zip(sums, parallel.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist())
    )
    n, puzzles = total["completions"], total["puzzles"]
    out = {
        "reward": total["reward"] / n,
        "reward_std": total["reward_std"] / puzzles,
        "frac_reward_zero_std": total["flat"] / puzzles,
        "format": total["format"] / n,
        "completions/mean_length": total["length"] / n,
        "completions/clipped_ratio": total["clipped"] / n,
    }
    for name in mixture:
        if total[f"{name}/n"]:
            out[f"rewards/{name}/mean"] = total[f"{name}/reward"] / total[f"{name}/n"]
            out[f"accuracy/{name}/level{levels_now[name]}"] = total[f"{name}/accuracy"] / total[f"{name}/n"]
            out[f"exact/{name}/level{levels_now[name]}"] = total[f"{name}/exact"] / total[f"{name}/n"]
    return out


class JsonLines:
    """An append-only file of records that all have `step`; `cut(step)` drops those beyond a step, for resuming."""

    def __init__(self, path):
        self.path = Path(path)
        self._file = None

    def write(self, record: dict) -> None:
        self._file = self._file or self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def read(self) -> list:
        if not self.path.exists():
            return []
        out = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a line cut short by a kill; nothing behind it is whole
        return out

    def cut(self, step: int) -> None:
        self.close()
        kept = [record for record in self.read() if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
        partial.replace(self.path)

    def close(self):
        if self._file:
            self._file.close()
            self._file = None


def standard_error(p: float, n: int) -> float:
    """Of a share p among n independent draws."""
    return math.sqrt(p * (1 - p) / n)


def final_table(records, mixture, levels):
    """A rich table from a run's records: held-out accuracy of each puzzle, chance, before and after, and the change with its
    standard error."""
    from rich.table import Table

    held_out = [r for r in records if any(k.startswith("eval/") for k in r)]
    first, last = held_out[0], held_out[-1]
    table = Table(title=f"Held-out accuracy (exact, greedy), step {first['step']} to {last['step']}")
    for column in ("puzzle", "level", "chance", "before", "after", "change", "s.e. of change", "puzzles"):
        table.add_column(column, justify="left" if column == "puzzle" else "right")
    for name in mixture:
        key = f"eval/{name}"
        before, after, n = first[f"{key}/exact"], last[f"{key}/exact"], last[f"{key}/n"]
        error = math.hypot(standard_error(before, first[f"{key}/n"]), standard_error(after, n))
        table.add_row(
            name,
            str(levels[name]),
            f"{last[f'{key}/chance']:.1%}",
            f"{before:.1%}",
            f"{after:.1%}",
            f"{100 * (after - before):+.1f}",
            f"{100 * error:.1f}",
            str(n),
        )
    return table
