"""How soon the live page shows its curves at 1,000 rounds of 1,000 clients, in headless Chromium.

python benchmarks/page.py

The run folder is written as runs are, a million lines in its ledger. Each opening is of a new
server and a new browser context, so nothing is cached; medians go to results/page.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "view")]

from browser import browser, tab, until  # noqa: E402
from test_local_page import big_run  # noqa: E402

from atoll.view.page.local import LocalPage  # noqa: E402

REPEATS = 5


def main() -> None:
    """Open it a few times and write how long that took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "results" / "page.json")
    options = parser.parse_args()
    curves, clients = [], []
    with tempfile.TemporaryDirectory() as root, browser() as started:
        big_run(Path(root) / "big")
        for _ in range(REPEATS):
            with LocalPage(Path(root)) as page, tab(started, page.url) as shown:
                until(shown, "charts.get('learning-chart')?.plot.data[0].length === 1000")
                curves.append(shown.evaluate("performance.now()") / 1000)
                until(shown, "clients.length === 1000", 30)
                clients.append(shown.evaluate("performance.now()") / 1000)
            time.sleep(0.5)
    static = HERE.parent / "src" / "atoll" / "view" / "page" / "static"
    own = sum((static / name).stat().st_size for name in ("index.html", "page.css", "page.js"))
    found = {
        "seconds to the curves": round(statistics.median(curves), 3),
        "seconds to the table of clients": round(statistics.median(clients), 3),
        "bytes of own code": own,
        "about": {
            "date": str(date.today()), "cores": os.cpu_count(), "machine": platform.processor(),
            "repeats": REPEATS,
        },
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
