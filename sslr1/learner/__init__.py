"""One optimizer step on groups of completions that were rewarded."""

from sslr1.learner.learner import Learner

__all__ = ["Learner"]
