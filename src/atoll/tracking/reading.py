"""Reading run folders back: checked, so that a damaged file is a sentence and not a surprise."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from atoll.core.model_file import load_model
from atoll.errors import CheckpointError
from atoll.tracking.record import Closed, Run
from atoll.tracking.tail import RunTail

with contextlib.suppress(ImportError):  # Windows has no such locks
    import fcntl


def read_run(path: str | Path) -> Run:
    """A run as its folder tells it, simulated or served; the model is read where there is one."""
    folder = run_at(Path(path)) or Path(path)
    config = read_config(folder)
    run = Run(config["plan"], config["data"], config["seed"], config["rounds"], folder=folder)
    read_rounds(run, folder)
    if (folder / "model.safetensors").exists():
        kept = load_model(folder / "model.safetensors")
        run.model, run.layout, run.about = kept.vectors, kept.layout, dict(kept.about)
    run.per_client = read_spread(folder)
    run.stopped = _told(folder, "stopped") or ""
    return run


def read_rounds(run: Run, folder: Path) -> list[Closed]:
    """Fill a run with the rounds that its folder has, which are returned."""
    tail = RunTail(folder)
    closed = tail.read()
    run.history[:] = [each.record for each in closed]
    run.seconds = sum(each.seconds or 0.0 for each in closed)
    run.refusals[:] = [reason for _, reason in tail.refusals]
    return closed


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run folder."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a run folder: it has no config.json")
    config = _read_json(path / "config.json")
    plan = config.get("plan")
    if not isinstance(plan, dict) or not isinstance(config.get("data"), dict):
        raise CheckpointError(f"{path / 'config.json'} is damaged or not atoll's")
    parts = [plan.get(name) for name in ("algorithm", "schedule", "learner")]
    if not all(isinstance(part, dict) and isinstance(part.get("kind"), str) for part in parts):
        raise CheckpointError(f"{path / 'config.json'} is damaged or not atoll's")
    if not all(isinstance(config.get(name), int) for name in ("seed", "rounds")):
        raise CheckpointError(f"{path / 'config.json'} is damaged or not atoll's")
    return {"identity": "", **config}


def read_spread(path: Path) -> dict[str, dict[str, float]]:
    """The last evaluation on each client's own test part, if there was one."""
    return _read_json(path / "spread.json") if (path / "spread.json").exists() else {}


def read_baselines(path: Path) -> dict[str, Any]:
    """What training apart and in one place gave, if that was tried: kind -> pooled and own."""
    return _read_json(path / "baselines.json") if (path / "baselines.json").exists() else {}


def read_environment(path: Path) -> dict[str, Any]:
    """Versions and machine, as they were noted."""
    return _read_json(path / "environment.json") if (path / "environment.json").exists() else {}


def read_engine(path: Path) -> str | None:
    """The engine that ran a folder's rounds; only it makes the same bytes again."""
    if not (path / "engine.json").exists():
        return None
    engine = _read_json(path / "engine.json").get("engine")
    return engine if isinstance(engine, str) and engine else None


def read_status(path: Path) -> str:
    """How a run ended: finished, interrupted, failed; running; or cut off, if nobody runs it."""
    told = _told(path, "status") or "unknown"
    return "cut off" if told == "running" and not in_use(path) else told


def _told(path: Path, name: str) -> str | None:
    """What a run folder's status says under a name."""
    try:
        return str(json.loads((path / "status.json").read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_use(path: Path) -> bool:
    """Whether a process is at work on a run folder; on Windows, whether it says so."""
    if os.name == "nt":
        return _told(path, "status") == "running"
    try:
        with (path / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def hold(path: Path) -> TextIO:
    """Keep other processes out of a run folder, for as long as what this gives is open."""
    held = (path / ".lock").open("w")
    for patience in () if os.name == "nt" else (0.05, 0.1, 0.2, None):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            # Whoever only looks whether it is in use holds it for a moment.
            if patience is None:
                held.close()
                raise CheckpointError(f"{path} is in use by a run that is still going on") from None
            time.sleep(patience)
    return held


def find_runs(root: Path) -> list[Path]:
    """Run folders directly below a folder, or in a state folder there, oldest first."""
    found = filter(None, map(run_at, root.iterdir())) if root.is_dir() else ()
    return sorted(found, key=lambda path: ((path / "config.json").stat().st_mtime, name_of(path)))


def run_at(path: Path) -> Path | None:
    """The run folder that a path means: itself or, of a server's state folder, the one in it."""
    inner = path / "run"
    if (path / "federation.json").is_file() and (inner / "config.json").is_file():
        return inner
    return path if (path / "config.json").is_file() else None


def name_of(path: Path) -> str:
    """What a run folder is called: by its own name or, in a state folder, by that one's."""
    path = path.resolve()
    return (path.parent if (path.parent / "federation.json").is_file() else path).name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged or not atoll's")
    return value
