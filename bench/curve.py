"""A run's learning curves as an SVG picture: sampled accuracy of every step, smoothed, and held-out accuracy as
dots."""

from sslr1.sums import plain_sum

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 46, 128, 14, 40
COLOURS = {
    "rotation": "#3b82c4",
    "ordering": "#d97a1f",
    "similarity": "#2f9e62",
    "inpainting": "#b0479a",
    "correspondence": "#a3812b",
}
WINDOW = 5  # steps that the mean of a point is over, as far as there are so many


def smoothed(values):
    """The mean of each value and those around it."""
    half = WINDOW // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [plain_sum(some) / len(some) for some in near]


def svg(run) -> str:
    """run: what record_run.py wrote."""
    steps = run["held_out"][-1]["step"]

    def x(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * step / steps

    def y(share):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" '
        'fill="#808080" role="img" aria-label="accuracy over steps">'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        out.append(
            f'<path d="M{LEFT} {y(share):.1f}H{WIDTH - RIGHT}" stroke="#808080" stroke-opacity=".25"/>'
            f'<text x="{LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    for step in range(0, steps + 1, max(1, steps // 6)):
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{x(steps / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">steps of GRPO</text>')
    ends = {}
    for name, values in run["sampled"].items():
        points = " ".join(f"{x(step):.1f},{y(share):.1f}" for step, share in enumerate(smoothed(values), 1))
        colour, chance = COLOURS[name], run["held_out"][-1][f"eval/{name}/chance"]
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-opacity=".6"/>'
        )
        out.append(
            f'<path d="M{LEFT} {y(chance):.1f}H{WIDTH - RIGHT}" stroke="{colour}" '
            'stroke-dasharray="2 4" stroke-opacity=".8"/>'
        )
        for row in run["held_out"]:
            out.append(
                f'<circle cx="{x(row["step"]):.1f}" cy="{y(row[f"eval/{name}/exact"]):.1f}" r="4" fill="{colour}"/>'
            )
        ends[name] = y(run["held_out"][-1][f"eval/{name}/exact"])
    below = -99.0
    for name, height in sorted(ends.items(), key=lambda end: end[1]):  # labels don't touch
        below = max(height, below + 15)
        out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{below + 4:.1f}" fill="{COLOURS[name]}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])
