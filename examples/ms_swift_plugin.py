"""The puzzles' reward for ms-swift: --external_plugins examples/ms_swift_plugin.py --reward_funcs sslr1

For version 4, tried with 4.6.0; version 3 has ORM and orms in swift.plugin.
"""

from swift.rewards import ORM, orms

from sslr1.integrations.ms_swift import reward


class Puzzles(ORM):
    def __call__(self, completions, solution, **columns):
        return reward(completions, solution)


orms["sslr1"] = Puzzles
