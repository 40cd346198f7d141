"""Rollouts inside the trainer: each prompt computed once, its keys and values shared by its group."""

from sslr1.rollout.engine import Engine
from sslr1.rollout.weights import SamplerWeights

__all__ = ["Engine", "SamplerWeights"]
