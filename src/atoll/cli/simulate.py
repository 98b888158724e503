"""`atoll simulate FILE.py`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from atoll.cli.files import find_run, read_federation
from atoll.cli.outcome import print_comparison, print_run
from atoll.cli.overrides import override
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, RunError
from atoll.federation import Federation
from atoll.simulation.devices import Devices
from atoll.simulation.interrupt import Interrupted
from atoll.tracking.folder import RunFolder, new_folder
from atoll.tracking.progress import progress
from atoll.tracking.reading import read_config


def run(options: argparse.Namespace) -> int:
    """Simulate, keep a run folder, and say where it is."""
    resume = options.resume is not None
    federation, clients, devices = read_federation(options.file)
    federation = override(federation, options.set)
    if resume:
        folder = find_run(options.resume, options.runs)
        seed = int(read_config(folder)["seed"]) if options.seed is None else options.seed
    else:
        name = options.name
        root = Path(options.runs)
        folder = root / name if name else new_folder(root, Path(options.file).stem)
        seed = options.seed or 0
    with contextlib.ExitStack() as open_for:
        page = None
        if options.web:
            from atoll.view.page.local import LocalPage

            page = open_for.enter_context(LocalPage(folder.parent, folder.name, options.port))
            print(f"watch it at {page.url}", flush=True)
        code = _simulate(options, federation, clients, devices, seed, folder, resume)
        if page is not None and code == 0:
            print(f"the page stays at {page.url} until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                page.wait()
        return code


def _simulate(
    options: argparse.Namespace,
    federation: Federation,
    clients: FederatedData,
    devices: Devices | None,
    seed: int,
    folder: Path,
    resume: bool,
) -> int:
    keeper = RunFolder(folder, every=options.checkpoint_every, best=federation.evaluation.best)
    try:
        result = federation.simulate(
            clients,
            seed=seed,
            devices=devices,
            engine=options.engine,
            folder=keeper,
            resume=resume,
            observers=[progress()],
        )
    except Interrupted as stop:
        settings = [part for setting in options.set for part in ("--set", setting)]
        words = ["atoll", "simulate", options.file, *settings, "--resume", str(folder)]
        words += ["--engine", options.engine] if options.engine else []
        print(
            f"atoll: stopped after round {stop.round}; go on with: {shlex.join(words)}",
            file=sys.stderr,
        )
        return 130
    except AtollError:
        # A folder that was made for a run that never began is of no use.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    except MemoryError as error:
        raise RunError(
            "there is not enough memory for this run; use fewer or smaller clients"
        ) from error
    print_run(result)
    if options.baselines:
        print_comparison(result, federation.baselines(clients, seed=seed, folder=folder))
    print(f"run folder: {folder}")
    return 0
