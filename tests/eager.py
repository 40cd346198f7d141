"""`sslr1.train` with a curriculum that moves within a few steps, up or down by the sign of the gain, and an alarm that
is raised behind the third step, entropy or not. For `test_train.py`."""

from sslr1.puzzles import curriculum
from sslr1.runs import alarms
from sslr1.train import main

if __name__ == "__main__":
    curriculum.HORIZON, curriculum.RISE, curriculum.FALL, curriculum.NEIGHBOURS = 2, 0.0, 0.0, 0.4
    alarms.FLOOR, alarms.COLLAPSE_STEPS = 1e9, 3
    main()
