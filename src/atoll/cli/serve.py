"""`atoll serve FILE.py --state FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from atoll.backends.allocator import share_freed_memory
from atoll.cli.files import read_data, read_plan
from atoll.cli.logs import log_to
from atoll.cli.overrides import override
from atoll.service.serve import Listening, serve
from atoll.service.settings import Service
from atoll.service.storage.folder import StateFolder


def run(options: argparse.Namespace) -> int:
    """Serve a federation until it is done or told to stop."""
    share_freed_memory()
    federation = override(read_plan(options.file), options.set)
    folder = StateFolder.open(Path(options.state))
    if options.database:
        folder.use_database(options.database)
    log_to(options.log)
    service = Service(
        seed=options.seed, sites=options.sites, lease=options.lease, presence=options.lease
    )
    listening = Listening(
        host=options.host, port=options.port, blobs=options.blobs, linger=options.linger
    )
    test = None if options.test is None else read_data(options.test, federation.encoding)
    done = serve(federation, folder, service, listening, test)
    return 0 if done else 130
