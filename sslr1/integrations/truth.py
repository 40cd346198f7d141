"""The ground truth that travels through another trainer's data: an answer and the form that was asked for, as JSON.

It is all that some trainers hand to a reward, so it says everything that scoring takes.
"""

import json

from sslr1.puzzles.reward import Answer, score


def pack(answer, thinking=True) -> str:
    """JSON of an Answer's `to_dict()` and of whether <think></think> was asked for."""
    return json.dumps({**answer.to_dict(), "thinking": thinking})


def scored(truth, completion, rule="default"):
    """The Score of a completion. truth: what `pack` gave, or what it holds as a dict, or an Answer; <think></think> is asked for
    unless it says otherwise. ValueError for an unknown rule, never for any completion."""
    if isinstance(truth, Answer):
        return score(truth, completion, rule)
    if isinstance(truth, str):
        truth = json.loads(truth)
    return score(Answer.from_dict(truth), completion, rule, truth.get("thinking", True))
