"""The report: one HTML file about a run, pictures included, that can be mailed and printed."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from atoll.core import files
from atoll.errors import ConfigurationError
from atoll.learners.metrics import HIGHER_IS_BETTER, directions, main_metric, more_is_better
from atoll.tracking.loggers import flat
from atoll.tracking.reading import (
    name_of,
    read_baselines,
    read_config,
    read_engine,
    read_environment,
    read_run,
    read_status,
)
from atoll.tracking.record import Closed, Run, human_bytes, human_seconds
from atoll.tracking.tail import RunTail
from atoll.view.html import table
from atoll.view.plots import draw_metric, draw_spread

#: Clients and failures that are listed by name.
LISTED = 20


def write_report(folder: Path, path: Path) -> Path:
    """Write the report of a run folder; needs matplotlib.

    What was learned, how, from whom; curves, fairness over clients, communication, privacy,
    baselines, environment, and the digests of everything that is needed to repeat it.
    """
    run = read_run(folder)
    closed = RunTail(folder).read()
    if not run.history:
        raise ConfigurationError(f"{folder} has no closed round to report on")
    parts = [
        _summary(run, folder, closed),
        _learned(run, read_baselines(folder)),
        _whom(run, closed),
        _fairness(run),
        _communication(run, closed),
        _privacy(run),
        _failures(run),
        _how(run, folder),
        _again(run, folder),
    ]
    title = ": ".join(dict.fromkeys((name_of(folder), str(run.data.get("name", "a run")))))
    style = resources.files("atoll.view").joinpath("report.css").read_text(encoding="utf-8")
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, [text.encode()])
    return path


def _summary(run: Run, folder: Path, closed: Sequence[Closed]) -> str:
    metric = main_metric(run.metrics)
    last = run.history[-1]
    algorithm = str(run.config["algorithm"]["kind"]).rpartition(".")[2]
    clients = run.data.get("clients")
    if clients is None:
        clients = len({part.client for each in closed for part in each.participants})
    sentence = (
        f"{_count(clients, 'site' if run.served else 'client')} trained together for "
        f"{_count(last.round, 'round')} with {algorithm}"
    )
    if metric in run.metrics:
        sentence += f"; {_words(metric)} at the end: {_figure(run.metrics[metric])}"
    sentence += (
        f". They sent {human_bytes(run.bytes_up)} and received {human_bytes(run.bytes_down)}; "
        f"the run took {human_seconds(run.seconds)}"
    )
    if last.clock and not run.served:
        sentence += f" ({human_seconds(last.clock)} of simulated time)"
    status = read_status(folder)
    if status != "finished":
        sentence += f". The run is {status}: {last.round} of {run.rounds} rounds have closed"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return f"<p class='lead'>{escape(sentence)}.</p><p class='soft'>Written on {written}.</p>"


def _learned(run: Run, baselines: Mapping[str, Any]) -> str:
    rows, own = [], directions(run.config, run.data)
    for name in run.metrics:
        if "_client_" in name:
            continue
        rounds, values = run.series(name)
        finite = [value for value in values if math.isfinite(value)]
        higher = own.get(name, name.endswith(tuple(HIGHER_IS_BETTER)))
        if finite and (higher or name in own or name.endswith("loss")):
            best = max(finite) if higher else min(finite)
            told = f"{_figure(best)} in round {rounds[values.index(best)]}"
        else:
            told = "-"  # nobody knows in which direction it is good
        rows.append([_words(name), _figure(values[-1]), told])
    text = table(["metric", "at the end", "best"], rows) if rows else "<p>Not evaluated.</p>"
    levels = {}
    metric = main_metric(run.metrics)
    if baselines:
        lines = []
        for name, kind in (("each client alone", "local"), ("all data in one place", "central")):
            found = baselines.get(kind, {})
            pooled, own = found.get("pooled", {}), found.get("own", {})
            lines.append([name, *(_figure(x.get(metric)) for x in (pooled, own))])
            if metric in pooled:
                levels[name] = float(pooled[metric])
        mine = run.metrics.get(f"{metric}_client_mean")
        lines.insert(1, ["together", _figure(run.metrics.get(metric)), _figure(mine)])
        head = ["training", f"{_words(metric)}, everyone's test data", "own test data, mean"]
        text += "<h3>Baselines</h3>" + table(head, lines)
    shown = [name for name in dict.fromkeys((metric, "loss")) if name in run.metrics]
    for name in shown or ["train_loss"]:
        if any(name in r.metrics or name in r.measurements for r in run.history):
            text += _drawn(run, name, "round", levels if name == metric else {})
    return f"<section><h2>What was learned</h2>{text}</section>"


def _whom(run: Run, closed: Sequence[Closed]) -> str:
    data = {name: value for name, value in run.data.items() if name not in ("digest", "served")}
    text = table(["data", ""], [[_words(k), _plain(v)] for k, v in data.items()])
    outcomes: Counter[str] = Counter()
    clients: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for each in closed:
        for client, outcome, _, up in each.participants:
            outcomes[outcome] += 1
            clients[client][0 if outcome == "accepted" else 1] += 1
            clients[client][2] += up
    if outcomes:
        text += "<h3>Invitations</h3>" + table(
            ["what came of it", "how often"], [[k, str(v)] for k, v in outcomes.most_common()]
        )
        rare = sorted(clients.items(), key=lambda one: (-one[1][1], one[1][0], one[0]))
        rows = [[name, str(a), str(b), human_bytes(up)] for name, (a, b, up) in rare[:LISTED]]
        said = f"the {LISTED} that missed most, of {len(rare)}" if len(rare) > LISTED else "all"
        text += f"<h3>Clients: {said}</h3>"
        text += table(["client", "averaged", "missed", "sent"], rows)
    return f"<section><h2>From whom</h2>{text}</section>"


def _fairness(run: Run) -> str:
    if not run.per_client:
        how = "; <code>Evaluation(clients_every=...)</code> does" * (not run.served)
        return (
            f"<section><h2>Clients apart</h2><p>Clients were not evaluated one by one{how}.</p>"
            "</section>"
        )
    text, own = "", directions(run.config, run.data)
    for metric, values in run.per_client.items():
        if not values:
            continue
        worst_first = sorted(values.values(), reverse=not more_is_better(metric, own))
        tail = max(1, math.ceil(len(worst_first) / 10))
        mean = sum(worst_first) / len(worst_first)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in worst_first) / len(worst_first))
        rows = [
            ["mean", _figure(mean)], ["standard deviation", _figure(deviation)],
            ["worst tenth", _figure(sum(worst_first[:tail]) / tail)],
            ["best tenth", _figure(sum(worst_first[-tail:]) / tail)],
            ["worst", _figure(worst_first[0])], ["best", _figure(worst_first[-1])],
        ]  # fmt: skip
        title = f"{_words(metric)} on own test data"
        text += f"<h3>{escape(title)}, {len(values)} clients</h3>{table(['', ''], rows)}"
        text += _picture(lambda path, m=metric: draw_spread(run, path, m), title)
    return f"<section><h2>Clients apart</h2>{text}</section>"


def _communication(run: Run, closed: Sequence[Closed]) -> str:
    rounds = len(run.history)
    invited = sum(record.invited for record in run.history)
    rows = [
        ["sent by clients", human_bytes(run.bytes_up), human_bytes(run.bytes_up / rounds)],
        ["received by clients", human_bytes(run.bytes_down), human_bytes(run.bytes_down / rounds)],
    ]
    text = table(["", "in all", "per round"], rows)
    text += f"<p>{_figure(invited / rounds)} clients were invited to a round, on average.</p>"
    metric = main_metric(run.metrics)
    if metric in run.metrics:
        text += _drawn(run, metric, "bytes", {})
    phases: dict[str, float] = defaultdict(float)
    for each in closed:
        for name, seconds in each.phases.items():
            phases[name] += seconds
    if phases:
        times = [[name, human_seconds(seconds)] for name, seconds in phases.items()]
        text += "<h3>Time</h3>" + table(["phase", "in all"], times)
    return f"<section><h2>Communication and time</h2>{text}</section>"


def _privacy(run: Run) -> str:
    stages = run.config.get("pipeline") or []
    stages = stages if isinstance(stages, list) else [stages]
    names = [str(s.get("kind", "")).rpartition(".")[2] for s in stages if isinstance(s, Mapping)]
    spent = {
        name: value
        for name, value in run.history[-1].measurements.items()
        if name == "epsilon" or name.endswith(("_epsilon", "delta"))
    }
    pipeline = " then ".join(names) or "a plain mean"
    text = f"<p>Updates went through: {escape(pipeline)}.</p>"
    if spent:
        rows = [[_words(name), _figure(value)] for name, value in spent.items()]
        text += table(["privacy spent", ""], rows)
    else:
        text += (
            "<p>The run reports no privacy budget: nothing in it bounds, in the sense of "
            "differential privacy, what the model tells about a single person. Data stayed with "
            "the clients; updates did not.</p>"
        )
    return f"<section><h2>Privacy</h2>{text}</section>"


def _failures(run: Run) -> str:
    if not run.refusals:
        return "<section><h2>What went wrong</h2><p>Nothing was refused.</p></section>"
    items = "".join(f"<li>{escape(reason)}</li>" for reason in run.refusals[:LISTED])
    more = len(run.refusals) - LISTED
    items += f"<li>and {more} more</li>" if more > 0 else ""
    return f"<section><h2>What went wrong</h2><ul>{items}</ul></section>"


def _how(run: Run, folder: Path) -> str:
    rows = [[name, value] for name, value in flat(run.config)]
    engine = read_engine(folder)
    rows += [["engine", engine]] if engine else []
    text = table(["setting", "value"], rows)
    about = read_environment(folder)
    machine = [[name, _plain(value)] for name, value in flat(about)]
    text += "<h3>Environment</h3>" + table(["", ""], machine)
    return f"<section><h2>How</h2>{text}</section>"


def _again(run: Run, folder: Path) -> str:
    config = read_config(folder)
    # The rounds of a served run hold the time of day, and its data are known to its sites alone.
    same = "plan and seed" if run.served else "plan, data and seed"
    digests = [[same, str(config.get("identity", ""))]]
    digests += [["data", str(run.data["digest"])]] if "digest" in run.data else []
    for label, name in (("rounds", "rounds.jsonl"), ("model", "model.safetensors")):
        if (folder / name).exists() and not (run.served and label == "rounds"):
            digests.append([f"{label} ({name})", _file_digest(folder / name)])
    what = "model" if run.served else "bytes"
    text = f"<p>The same plan, data and seed give the same {what}. SHA-256 of each:</p>"
    text += table(["of", "digest"], digests)
    arguments = read_environment(folder).get("arguments")
    if isinstance(arguments, list) and arguments:
        text += f"<p>It was run by:</p><pre>{escape(' '.join(map(str, arguments)))}</pre>"
    whole = json.dumps(config, indent=2)
    text += f"<details><summary>config.json</summary><pre>{escape(whole)}</pre></details>"
    return f"<section><h2>To repeat it</h2>{text}</section>"


def _drawn(run: Run, metric: str, against: str, levels: Mapping[str, float]) -> str:
    title = f"{_words(metric)} against {against}"
    return _picture(
        lambda path: draw_metric({"": run}, path, metric, against, levels=levels), title
    )


def _picture(draw: Any, title: str) -> str:
    """A picture as SVG inside the page."""
    with tempfile.TemporaryDirectory() as place:
        text = draw(Path(place) / "picture.svg").read_text(encoding="utf-8")
    inner = text[text.index("<svg") :]
    return f"<figure role='img' aria-label='{escape(title, quote=True)}'>{inner}</figure>"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        whole = sha256()
        while piece := file.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _count(number: object, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: object) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
