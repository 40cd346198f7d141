"""Puzzles, their pixels and their reward in your own loop: python examples/ops_in_your_loop.py"""

import torch

import sslr1

images = [
    torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8) for _ in range(10)
]  # yours: uint8 [H, W, 3], any device
batch = sslr1.puzzles.make(images, list(sslr1.puzzles.NAMES) * 2, level=[1, 2, 3, 3, 2] * 2, seed=0, thinking=False)
pixel_values, image_grid_thw = batch.render_patches()  # one call renders the lot, as Qwen2.5-VL's processor would
for question, answer, chance, decidable in zip(batch.questions, batch.answers, batch.chance, batch.decidable):
    print(question, "→", answer.text, f"(chance {chance:.1%})", "" if decidable else "(this image can't decide it)")
print(sslr1.puzzles.score(batch.answers[0], r"It is \boxed{90}", thinking=False))
