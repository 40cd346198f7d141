"""The puzzles' reward for ms-swift: --external_plugins examples/ms_swift_plugin.py --reward_funcs sslr1

Written after ms-swift's sources of 2026 (version 4; version 3 has ORM and orms in swift.plugin); not run by us.
"""

from swift.rewards import ORM, orms

from sslr1.integrations.ms_swift import reward


class Puzzles(ORM):
    def __call__(self, completions, solution, **columns):
        return reward(completions, solution)


orms["sslr1"] = Puzzles
