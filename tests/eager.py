"""`sslr1.train` with a curriculum that moves within a few steps, up or down by the sign of the gain. For `test_train.py`."""

from sslr1.puzzles import curriculum
from sslr1.train import main

if __name__ == "__main__":
    curriculum.HORIZON, curriculum.RISE, curriculum.FALL, curriculum.NEIGHBOURS = 2, 0.0, 0.0, 0.4
    main()
