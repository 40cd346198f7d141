"""One optimizer step on groups of completions that were rewarded."""

from sslr1.learner.learner import Learner, StepResult

__all__ = ["Learner", "StepResult"]
