"""Takes the pictures of the live page that the documentation shows; needs chromium and playwright.

python docs/screenshots.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import RandomDevices
from atoll.view.page.local import LocalPage

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Two runs of the digits, looked at on a desk and on a phone."""
    with tempfile.TemporaryDirectory() as root:
        clients = data.load("digits").dirichlet(clients=40, alpha=0.3, seed=0)
        for name, algorithm in (
            ("digits-fedavg", algorithms.FedAvg()),
            ("digits-scaffold", algorithms.Scaffold()),
        ):
            Federation(
                learner=NumpyLearner(layers=(64, 32, 10), lr=0.1, batch_size=10, epochs=2),
                algorithm=algorithm,
                schedule=schedules.Synchronous(rounds=60, cohort=12, minimum=4, deadline=60.0),
                evaluation=Evaluation(clients_every=5, spread=("accuracy", "loss")),
            ).simulate(clients, folder=Path(root) / name, devices=RandomDevices(dropout=0.1))
        with LocalPage(Path(root), "digits-scaffold") as page, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            desk = browser.new_context(viewport={"width": 1100, "height": 1250})
            _shoot(desk.new_page(), page.url, HERE / "page.png", compare=True)
            phone = browser.new_context(
                viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
            )
            _shoot(phone.new_page(), page.url, HERE / "page-phone.png", compare=False)
            browser.close()


def _shoot(tab, url: str, path: Path, *, compare: bool) -> None:
    tab.goto(url)
    tab.wait_for_selector("#clients tbody tr")
    tab.wait_for_selector("#round-parts li")
    if compare:
        tab.check("#others input")
        tab.wait_for_selector("#differences tbody tr")
        tab.evaluate("scrollTo(0, 0)")
    tab.wait_for_timeout(300)
    tab.screenshot(path=path)


if __name__ == "__main__":
    main()
