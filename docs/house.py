"""Draws `house.svg`, the picture of the architecture, from the floors that the tests enforce.

python docs/house.py
"""

from __future__ import annotations

from pathlib import Path

FLOORS = [
    [("errors", "sentences for people")],
    [
        ("core", "vectors, updates, keyed draws, bytes, files"),
        ("view/figure", "one style of figure"),
    ],
    [
        ("view/html", "what notebooks and reports show"),
        ("view/population", "who holds what, drawn"),
    ],
    [("data", "who holds what"), ("aggregation", "stages, exact sums, conversations")],
    [("learners", "local training and evaluation")],
    [
        ("algorithms", "local rules, server optimisers, compositions"),
        ("view/plots", "curves of runs"),
    ],
    [("rounds", "plan, schedules, coordinator, driver: no clock, no I/O")],
    [("tracking", "records, run folders, progress, loggers")],
    [("view", "reports and the live page")],
    [
        ("backends", "stacks, threads, processes, Ray"),
        ("protocol", "messages, identities, certificates"),
    ],
    [
        ("simulation", "virtual clock, devices, attackers"),
        ("service", "loop, HTTP, storage"),
        ("site", "the agent beside the data"),
    ],
    [("federation", "Federation and its verbs")],
    [("flower", "Flower apps, unmodified, as our runs")],
    [
        ("cli", "atoll simulate | show | serve | join | status ..."),
        ("testing", "checks for learners"),
    ],
]
WIDTH, HEIGHT, GAP = 720, 46, 8


def main() -> None:
    """Write the picture beside this file."""
    parts = []
    total = len(FLOORS) * (HEIGHT + GAP) + GAP
    for number, rooms in enumerate(FLOORS):
        y = total - (number + 1) * (HEIGHT + GAP)
        width = (WIDTH - 40 - GAP * (len(rooms) - 1)) / len(rooms)
        parts.append(f'<text x="14" y="{y + 28}" class="n">{number}</text>')
        for place, (name, what) in enumerate(rooms):
            x = 36 + place * (width + GAP)
            kind = "later" if what.startswith("to come") else "room"
            parts.append(
                f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="5" '
                f'class="{kind}"/>'
                f'<text x="{x + 12:.0f}" y="{y + 20}" class="t">{name}</text>'
                f'<text x="{x + 12:.0f}" y="{y + 37}" class="w">{what}</text>'
            )
    style = (
        "text{font-family:system-ui,sans-serif;fill:#12303f}.t{font-weight:600;font-size:15px}"
        ".w{font-size:12px}.n{font-size:12px;fill:#6b8794}.room{fill:#e3f1f6;stroke:#5b9ab5}"
        ".later{fill:#fff;stroke:#9db8c4;stroke-dasharray:5 4}"
    )
    Path(__file__).with_name("house.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" role="img" '
        f'aria-label="The rooms of atoll, floor by floor"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{total}" fill="#fff"/>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
