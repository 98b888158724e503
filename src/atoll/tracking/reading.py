"""Reading run folders back: checked, so that a damaged file is a sentence and not a surprise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atoll.core import files
from atoll.errors import CheckpointError
from atoll.tracking.record import Record, Run


def read_run(path: str | Path) -> Run:
    """A run as its folder tells it; the model is read where the run is complete."""
    folder = Path(path)
    config = read_config(folder)
    run = Run(config["plan"], config["data"], config["seed"], config["rounds"], folder=folder)
    run.history = read_history(folder)
    run.seconds = read_seconds(folder)
    if (folder / "model.safetensors").exists():
        run.model = files.load(folder / "model.safetensors", "model")[1]
    run.per_client = read_spread(folder)
    run.refusals = read_refusals(folder)
    return run


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


def read_history(path: Path) -> list[Record]:
    """The rounds of a run folder."""
    try:
        return [Record.read(line) for line in read_lines(path / "rounds.jsonl")]
    except (TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / 'rounds.jsonl'} has a line of another form: {error}"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; one that a crash cut off at the end is left out."""
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("round"), int):
                raise ValueError("not a line of a run")
            lines.append(line)
        except ValueError:
            if number < len(texts):
                raise CheckpointError(f"{path} is damaged at line {number}") from None
    return lines


def read_seconds(path: Path) -> float:
    """The real time that a run has taken, as far as it was noted."""
    lines = read_lines(path / "timings.jsonl")
    return float(sum(s for line in lines if isinstance(s := line.get("seconds"), int | float)))


def read_refusals(path: Path) -> list[str]:
    """Why updates were refused and attempts abandoned, in words."""
    return [str(line.get("reason", "")) for line in read_lines(path / "refusals.jsonl")]


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
    """How a run ended: finished, interrupted, or running (which a killed one says too)."""
    try:
        return str(json.loads((path / "status.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def in_use(path: Path) -> bool:
    """Whether a process is at work on a run folder; on Windows, whether it says so."""
    try:
        import fcntl
    except ImportError:
        return read_status(path) == "running"
    try:
        with (path / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def find_runs(root: Path) -> list[Path]:
    """Run folders directly below a folder, oldest first."""
    found = [path.parent for path in root.glob("*/config.json")] if root.is_dir() else []
    return sorted(found, key=lambda path: ((path / "config.json").stat().st_mtime, path.name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged or not atoll's")
    return value
