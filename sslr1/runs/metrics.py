"""What a step's metrics are made of."""

from dataclasses import dataclass

import torch

from sslr1 import distributed, puzzles
from sslr1.ops import transfer
from sslr1.puzzles import curriculum
from sslr1.sums import plain_sum

OVERALL = ("puzzles", "completions", "reward", "reward_std", "flat", "length", "clipped", "format", "resampled")
IMAGES = ("images", "bad", "untold")  # that puzzles asked for, of which bad; bad ones that aren't listed yet
PER_LEVEL = ("n", "reward", "accuracy", "exact", "chance", "gain", "margin")  # over completions; n is how many


@dataclass
class StepTotals:
    """Sums of a step's completions over all ranks: overall[key] and levels[puzzle][level][key]."""

    overall: dict
    levels: dict

    @classmethod
    def gather(cls, batch, drawn, trained, *, mixture, rule, device, images=(0, 0, 0)):
        """batch: this rank's PuzzleBatch; drawn, trained: the `Rollout` of its first puzzles and the one that the
        learner was given; mixture: names, of puzzles and tasks. All ranks must call it. What is reduced has a
        place for every level of every one, whether or not a rank has met it. images: counts by the names of IMAGES.

        "flat" and "resampled" count what was trained on. All else counts the first draw of every slot: groups are drawn
        again where every completion earned the same, so leaving those out would move the means, and the curriculum."""
        overall = dict.fromkeys(OVERALL, 0.0) | dict(zip(IMAGES, map(float, images)))
        levels = {
            name: {level: dict.fromkeys(PER_LEVEL, 0.0) for level in puzzles.LEVELS.get(name, (1,))} for name in mixture
        }
        overall["flat"] += int((trained.rewards.amax(1) == trained.rewards.amin(1)).sum())
        overall["resampled"] += trained.resampled
        asked = zip(batch.names, batch.levels, batch.answers, batch.chance, drawn.scores, drawn.groups)
        for name, level, answer, chance, group_scores, group in asked:
            rewards = torch.tensor([s.reward for s in group_scores], dtype=torch.float64)
            overall["puzzles"] += 1
            overall["completions"] += len(rewards)
            overall["reward"] += rewards.sum().item()
            overall["reward_std"] += rewards.std().item() if len(rewards) > 1 else 0.0
            overall["length"] += sum(len(s.tokens) for s in group.samples)
            overall["clipped"] += sum(s.finish == "length" for s in group.samples)
            overall["format"] += sum(s.format_ok for s in group_scores)
            found = levels[name][level]
            found["n"] += len(rewards)
            found["reward"] += rewards.sum().item()
            found["accuracy"] += plain_sum(s.accuracy for s in group_scores)
            found["exact"] += plain_sum(s.exact for s in group_scores)
            found["chance"] += chance * len(rewards)
            found["gain"] += plain_sum(curriculum.gain(answer, s, chance) for s in group_scores)
            found["margin"] += plain_sum(curriculum.margin(answer, s, rule) for s in group_scores)
        parts = [overall, *(found for own in levels.values() for found in own.values())]
        vector = torch.tensor([value for part in parts for value in part.values()], dtype=torch.float64)
        vector = transfer.upload(vector, device, "counts")
        values = iter(distributed.all_reduce(vector).tolist())
        for part in parts:
            part.update({key: next(values) for key in part})
        return cls(overall, levels)

    def metrics(self) -> dict:
        """By their names in metrics.jsonl; a puzzle or level that had no completions has no entry."""
        total = self.overall
        n, count = total["completions"], total["puzzles"]
        out = {
            "reward": total["reward"] / n,
            "reward_std": total["reward_std"] / count,
            "frac_reward_zero_std": total["flat"] / count,
            "format": total["format"] / n,
            "completions/mean_length": total["length"] / n,
            "completions/clipped_ratio": total["clipped"] / n,
        }
        for name, own in self.levels.items():
            met = {level: found for level, found in own.items() if found["n"]}
            if met:
                all_n = plain_sum(found["n"] for found in met.values())
                out[f"rewards/{name}/mean"] = plain_sum(found["reward"] for found in met.values()) / all_n
            for level, found in met.items():
                out[f"accuracy/{name}/level{level}"] = found["accuracy"] / found["n"]
                out[f"exact/{name}/level{level}"] = found["exact"] / found["n"]
                out[f"chance/{name}/level{level}"] = found["chance"] / found["n"]  # of being exact
        return out
