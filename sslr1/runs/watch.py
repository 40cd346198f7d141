"""What ends a run before its last step, and what only warns."""

from sslr1.errors import UserError
from sslr1.runs.alarms import Alarms

SKIPS = 10  # steps in a row without a finite gradient that end a run
ENOUGH_IMAGES = 64  # before data.max_bad is held against them


class Watch:
    """Counts bad images and hears alarms. bad_images: `BadImages`. All ranks hold one and feed it the same numbers."""

    def __init__(self, config, bad_images, main):
        self.max_bad, self.bad_images, self.main = config.data.max_bad, bad_images, main
        self.alarms = Alarms(config.puzzles.rule)
        self.asked = self.bad = 0  # images that puzzles asked for, of which bad

    def state(self) -> dict:
        return {"alarms": self.alarms.state(), "images": [self.asked, self.bad]}

    def load(self, state: dict) -> None:
        self.alarms.load(state["alarms"])
        self.asked, self.bad = state["images"]

    def images(self, totals) -> None:
        """List bad images that are new. Raises UserError if they are too many. Counted are the images that slots asked
        for, which are the same ones whatever the ranks, and resuming goes on counting."""
        if totals.overall["untold"]:
            self.bad_images.update()
        self.asked += int(totals.overall["images"])
        self.bad += int(totals.overall["bad"])
        if self.asked >= ENOUGH_IMAGES and self.bad > self.max_bad * self.asked:
            words = f"{self.bad} of the {self.asked} images that puzzles asked for were bad, more than data.max_bad "
            raise UserError(f"{words}{self.max_bad:.0%}: {self.bad_images}" if self.main else "")

    def lost(self, step, samples):
        """Raises UserError: SKIPS steps in a row had no finite gradient. samples: the file that holds the last
        one's."""
        words = (
            f"{SKIPS} steps in a row, to step {step}, had a gradient that is not finite and were skipped; the samples "
            f"of the last are in {samples}. Checkpoints are whole: go on with other settings, e.g. a lower optim.lr, "
            "and checkpoint.allow_change=true"
        )
        raise UserError(words if self.main else "")
