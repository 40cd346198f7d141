"""What the tests of mutated files run in a process of its own, since a decoder that crashes takes its process along."""

import hashlib
import json
import sys
from pathlib import Path

from sslr1 import model
from sslr1.data import ImageFolder
from tests.data.test_data import content, stream


def epoch(folder, tiny) -> dict:
    """One epoch of puzzles that show no image but their own: {"slots": {slot: [image, hash of the rest]}, "bad":
    {image: reason}, "asked": images that slots asked for, of which bad}. JSON-able."""
    files = ImageFolder.scan(folder)
    puzzles = stream(files, model.load_tokenizer(tiny), mixture={"rotation": 0.6, "ordering": 0.4})
    slots, asked = {}, [0, 0]
    for step in range(len(files) // puzzles.batch):
        batch = puzzles.get(step)
        asked = [a + b for a, b in zip(asked, batch.images_asked())]
        for slot, question, answer, image, pixels in content(batch):
            rest = hashlib.blake2b(f"{question}{answer}".encode() + pixels).hexdigest()
            slots[str(step * puzzles.batch + slot)] = [image, rest]
    puzzles.close()
    return {"slots": slots, "bad": {str(n): reason for n, reason in puzzles.store.bad.items()}, "asked": asked}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(epoch(*sys.argv[1:3])))
