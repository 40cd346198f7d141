"""`sslr1.train` whose loss is NaN in the steps SSLR1_TEST_NAN="first last". For test_nan.py."""

import os

import torch

from sslr1.learner import Learner
from sslr1.train import main

if __name__ == "__main__":
    first, last = map(int, os.environ["SSLR1_TEST_NAN"].split())
    inner = Learner.step

    def step(self, groups, rewards, advantages=None):
        if advantages is None and first <= self.step_number + 1 <= last:
            advantages = torch.full_like(rewards, float("nan"))
        return inner(self, groups, rewards, advantages)

    Learner.step = step
    main()
