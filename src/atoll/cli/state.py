"""Commands about a federation that is served, on its state folder or with an identity."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from atoll.cli.access import PATIENCE, access, note
from atoll.cli.tables import figure, print_table
from atoll.core.files import own_folder, write_atomically, write_json
from atoll.learners.metrics import main_metric
from atoll.protocol.certificates import make_server
from atoll.protocol.identity import Token, make_key
from atoll.service.storage.audit import lines, verify
from atoll.service.storage.folder import StateFolder, check_name
from atoll.site.connection import Connection, first_contact
from atoll.site.terms import approve
from atoll.tracking.record import human_bytes, human_seconds


def run(options: argparse.Namespace) -> int:
    """Do what the command says."""
    return int(globals()[f"_{options.action}"](options))


def _init(options: argparse.Namespace) -> int:
    path = Path(options.state)
    project = check_name(options.project or path.resolve().name)
    hosts = options.host or ["localhost", "127.0.0.1"]
    folder = StateFolder.make(path, project, hosts, options.database)
    print(
        f"made {path}: the authority and the server's certificate of {project}\n"
        f"keep {path / 'ca-key.pem'} safe: whoever has it can pretend to be the server\n\n"
        f"next:\n  atoll invite {path} hospital-a      a one-time token for each site\n"
        f"  atoll serve federation.py --state {path}\n"
        f"  atoll join {folder.url(8443)} federation.py --data site.py --token ..."
    )
    return 0


def _hosts(options: argparse.Namespace) -> int:
    folder = StateFolder.open(Path(options.state))
    make_server(folder.path, options.name)
    print(f"the server's certificate is for {', '.join(options.name)}; start the server again")
    return 0


def _invite(options: argparse.Namespace) -> int:
    folder = StateFolder.open(Path(options.state))
    token = folder.invite(check_name(options.name), options.role, options.hours)
    print(token)
    return 0


def _enrol(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    token = Token.read(options.token or os.environ.get("ATOLL_TOKEN", ""))
    own_folder(folder, "site.json", "key.pem", "ca.pem")
    pem = None if options.public_ca else first_contact(options.url, token)
    if pem is None:
        (folder / "ca.pem").unlink(missing_ok=True)
    else:
        write_atomically(folder / "ca.pem", [pem])
    link = Connection(options.url, pem, make_key(folder / "key.pem"), note=note, patience=PATIENCE)
    enrolled = link.enrol(token)
    about = {"url": link.url, "site": enrolled.site, "project": enrolled.project}
    write_json(folder / "site.json", about)
    print(f"{enrolled.site} is {enrolled.role} of {enrolled.project}")
    return 0


def _approve(options: argparse.Namespace) -> int:
    terms = approve(Path(options.folder), refuse=options.refuse)
    print(json.dumps(terms, indent=2))
    print("refused" if options.refuse else "approved")
    return 0


def _status(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        found = federation.status()
    if options.json:
        print(json.dumps(found))
        return 0
    found["until"] = _until(found)
    silence = found.pop("silence")
    if found["at_work"] and silence:
        found["given up after"] = f"{human_seconds(silence)} of silence"
    print_table(("", ""), [(name.replace("_", " "), _shown(found[name])) for name in found])
    return 0


def _until(found: Mapping[str, Any]) -> str:
    """When a wait ends by itself, in words."""
    until = found["until"]
    if not found["waiting_for"]:
        return ""
    if until is None:
        silent = found.get("silence") if found.get("at_work") else None
        quiet = f"are silent for {human_seconds(silent)}, " if silent else ""
        return f"they answer, {quiet}are revoked, or the federation is stopped"
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(until))
    return f"{clock}, in {human_seconds(max(until - time.time(), 0))}"


def _rounds(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        found = federation.rounds(options.since)
        if options.json:
            for row in found:
                print(json.dumps(row))
            return 0
        table = [_round(row) for row in found]
    print_table(("round", "state", "updates", "received", "took", "figures"), table)
    return 0


def _round(row: Mapping[str, Any]) -> Sequence[str]:
    record = row["record"]
    figures = record.get("metrics") or record.get("measurements") or {}
    shown = ", ".join(f"{name} {figure(value)}" for name, value in figures.items())
    took = f"{row['ended'] - row['opened']:.1f} s" if row["ended"] else ""
    return (
        str(row["round"]), row["state"], str(record.get("accepted", "")),
        human_bytes(record.get("bytes_up", 0)), took, shown or row["reason"],
    )  # fmt: skip


def _measured(said: Mapping[str, Any] | None) -> str:
    """What a site said last of how good a model is there."""
    if not said:
        return ""
    figures = said["figures"]
    main = main_metric(figures) if figures else ""
    names = dict.fromkeys(filter(None, (main, "loss" if "loss" in figures else "")))
    shown = ", ".join(f"{name} {figure(figures[name])}" for name in names)
    return f"round {said['round']}, {said['examples']} rows: {shown or 'no figure'}"


def _sites(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        found = federation.sites()
    if options.json:
        for row in found:
            print(json.dumps(row))
        return 0
    print_table(
        ("site", "role", "status", "examples", "last seen", "on rows of its own"),
        [
            (
                row["name"],
                row["role"],
                row["status"],
                "" if row["examples"] is None else str(row["examples"]),
                "" if row["seen"] is None else _ago(row["seen"]),
                _measured(row["measured"]),
            )
            for row in found
        ],
    )
    return 0


def _revoke(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        federation.revoke(options.name)
    print(f"{options.name} is revoked; its next request will be refused")
    return 0


def _stop(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        found = federation.status()
        if found["phase"] in ("done", "failed"):
            print(
                f"there is nothing to stop: {found['round']} of {found['rounds']} rounds, and over"
            )
            return 0
        federation.stop()
    if found["server"] == "running":
        print("stopping: sites are told when they next ask; `atoll serve` goes on from here")
    else:
        print("no server runs, so no site is told; `atoll serve` goes on from here")
    return 0


def _page(options: argparse.Namespace) -> int:
    with closing(access(Path(options.state), options.url)) as federation:
        print(f"{federation.link()}\ngood for five minutes, once")
    return 0


def _audit(options: argparse.Namespace) -> int:
    folder = StateFolder.open(Path(options.state))
    with closing(folder.store()) as store, store.reading() as connection:
        if options.what == "show":
            for line in lines(connection):
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.time))
                print(f"{line.number} {when} {line.actor}: {line.event} {line.detail}")
            return 0
        count, last, problem = verify(connection)
    if problem:
        print(f"the audit log does not hold: {problem}; the {count} lines before it do")
        return 1
    print(f"the audit log holds: {count} lines, the last of digest {last}")
    if options.expect and options.expect != last:
        print(f"but it should end with {options.expect}: lines were cut off or added since")
        return 1
    return 0


def _backup(options: argparse.Namespace) -> int:
    size = StateFolder.open(Path(options.state)).backup(Path(options.file))
    print(f"{options.file}: {human_bytes(size)}; it holds the authority's key, keep it safe")
    return 0


def _restore(options: argparse.Namespace) -> int:
    StateFolder.restore(Path(options.file), Path(options.state))
    print(f"restored into {options.state}; go on with: atoll serve FILE.py --state {options.state}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nobody"
    return "-" if value is None or value == "" else str(value)


def _ago(when: float) -> str:
    seconds = max(time.time() - when, 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
