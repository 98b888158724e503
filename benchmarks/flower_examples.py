"""Every example of Flower's repository, unmodified, under `atoll flower`: which run, and which not.

python benchmarks/flower_examples.py --flower FOLDER [--against] [--only NAME ...]

FOLDER is a checkout of Flower's repository, whose examples' packages are installed here as far as
they can be. What examples download has small stand-ins of the same columns and shapes, made anew:
data sets and models as folders below where an example is run, which their libraries look for before
they ask a hub. Every hub is off. So this tells whether apps run, not how well they learn.

An example `ran` if its command ends well and every client delivers every time. `--against` runs
those in Flower's own simulation too, and tells whether both leave the same files. A table is
printed; results/flower_examples.json has all of it: metrics, files, last lines, versions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from atoll.tracking.reading import read_run

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
#: At most so many clients, where a README asks for more.
CLIENTS = 40

LLM = "network data: a language model of 7 billion parameters, on a GPU"
#: What no stand-in makes up for.
BEYOND: dict[str, str] = {
    "android": "a device: Android",
    "android-kotlin": "a device: Android",
    "docs": "it is the examples' documentation, not an app",
    "fedrag": "network data: text corpora and a language model",
    "flowertune-llm": "network data: a language model of 3 billion parameters, on a GPU",
    "flowertune-llm-code": LLM,
    "flowertune-llm-finance": LLM,
    "flowertune-llm-general-nlp": LLM,
    "flowertune-llm-medical": LLM,
    "ios": "a device: iOS",
    "quickstart-cpp": "a client in C++, with a SuperLink",
    "quickstart-lerobot": "a package of a git repository: lerobot, at one commit",
    "whisper-federated-finetuning": "network data: speech, by a loading script of datasets below 4",
}
#: Clients of examples whose README does not say how many, and whose default is too few.
ASKED = {"flower-secure-aggregation": 5}
#: What examples that are written for SuperNodes are told about their nodes; databases are SQLite's.
NODES = {
    "embedded-devices": "dataset-path='parts/fashion_mnist/{partition-id}'",
    "federated-analytics": "db-url='sqlite:///people-{partition-id}.db'",
    "supernode-authentication": "dataset-path='parts/cifar10/{partition-id}'",
}

#: Flower's simulation of an app folder, without building an environment first.
SIMULATION = """
import importlib, json, sys
import flwr.simulation
from flwr.app import Context, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
place, server, client, clients, config = sys.argv[1:]
config = json.loads(config)
sys.path.insert(0, place)
inner = importlib.import_module("flwr.simulation.run_simulation")
run = Run.create_empty(7)
run.primary_task_id, run.federation_id = 7, inner.NOOP_FEDERATION_ID
run.override_config = config
TaskIdentity.task_id = TaskIdentity.run_id = 7
TaskIdentity.node_id = inner.SUPERLINK_NODE_ID
inner._run_simulation(
    int(clients), inner.EventType.PYTHON_API_RUN_SIMULATION_ENTER, is_app=True, app_dir=place,
    client_app_attr=client, server_app_attr=server, run=run,
    server_app_context=Context(7, 0, {}, RecordDict(), config),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
"""

#: The metric that `evaluate.load("accuracy")` finds, as its hub has it.
ACCURACY = '''
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """The share of predictions that are right."""

    def _info(self):
        whole = datasets.Value("int32")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        right = sum(one == other for one, other in zip(predictions, references))
        return {"accuracy": right / len(references)}
'''


def main() -> None:
    """Run everything that can run, and write the verdicts as they come."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flower", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--against", action="store_true", help="run Flower's simulation too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these examples alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one command")
    parser.add_argument("--keep", type=Path, help="where what examples say and write stays")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "flower_examples.json")
    options = parser.parse_args()
    found = [
        each for each in examples(options.flower)
        if not options.only or each.name in options.only
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = (options.keep or Path(scratch) / "kept").resolve()
        stand_ins = Path(scratch) / "stand_ins"
        make_stand_ins(stand_ins)
        for example in found:
            text = json.dumps(judged(example, kept / example.name, stand_ins, options))
            # Where things lie on this machine is nobody's.
            for folder in (options.flower, options.flower.resolve(), kept, sys.prefix):
                text = text.replace(f"{folder}/", "")
            rows.append(json.loads(text))
            print(text, file=sys.stderr, flush=True)
            whole = {"about": about(options), "examples": rows}
            options.out.write_text(json.dumps(whole, indent=2) + "\n")
    print(table(rows, options.against))


def examples(flower: Path) -> list[Path]:
    """The folders of all examples, and of the framework's templates where there are any."""
    found = [*flower.glob("examples/*"), *flower.glob("framework/**/templates/quickstart*")]
    folders = [each for each in found if each.is_dir()]
    if not folders:
        raise SystemExit(f"{flower} has no examples")
    return sorted(folders, key=lambda each: each.name)


def judged(
    example: Path, place: Path, stand_ins: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One example's row: its verdict under atoll, and if asked, under Flower."""
    row: dict[str, Any] = {"example": example.name}
    app = app_of(example)
    if example.name in BEYOND:
        return {**row, "verdict": "cannot run here", "why": BEYOND[example.name]}
    if app is None:
        return {**row, "verdict": "cannot run here", "why": "it has no ServerApp and ClientApp"}
    flwr = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]
    config = flat(flwr["app"].get("config", {}))
    told = {"num-server-rounds": options.rounds} if "num-server-rounds" in config else {}
    clients = clients_of(example, flwr)
    row |= {"clients": clients, "rounds": told.get("num-server-rounds", "its own")}
    sets = [text for name, value in told.items() for text in ("--set", f"{name}={value}")]
    ours = [
        str(BIN / "atoll"), "flower", str(app), "--clients", str(clients), "--runs", "runs", *sets,
    ]  # fmt: skip
    if example.name in NODES:
        ours += ["--node-config", NODES[example.name]]
    row |= atoll_verdict(command(ours, place / "atoll", stand_ins, options.limit))
    if options.against and example.name in NODES:
        row["flower"] = {"verdict": "its simulation has no node config"}
    elif options.against and row["verdict"] != "cannot run here":
        parts = flwr["app"]["components"]
        theirs = [
            sys.executable, "-c", SIMULATION, str(app.resolve()), parts["serverapp"],
            parts["clientapp"], str(clients), json.dumps({**config, **told}),
        ]  # fmt: skip
        ended = command(theirs, place / "flower", stand_ins, options.limit)
        row["flower"] = flower_verdict(ended)
        row["same files"] = row["flower"]["files"] == row["files"]
    return row


def app_of(example: Path) -> Path | None:
    """The folder of an example's app, which may be one below."""
    for project in sorted([*example.glob("pyproject.toml"), *example.glob("*/pyproject.toml")]):
        whole = tomllib.loads(project.read_text())
        if whole.get("tool", {}).get("flwr", {}).get("app", {}).get("components"):
            return project.parent
    return None


def clients_of(example: Path, flwr: dict[str, Any]) -> int:
    """How many clients an example is written for: as its README says, or its own federation."""
    federations = flwr.get("federations", {})
    own = federations.get(str(federations.get("default")), {}).get("options", {})
    readme = example / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    said = re.findall(r"options\.num-supernodes = (\d+)", text)
    asked = ASKED.get(example.name) or own.get("num-supernodes") or (said[0] if said else 2)
    return min(int(asked), CLIENTS)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names, which is how Flower passes them on."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


class Ended:
    """How a command ended, what it said, and what it left in its folder."""

    def __init__(self, code: int | None, said: str, seconds: float, place: Path) -> None:
        self.code, self.said, self.seconds, self.place = code, said, seconds, place

    def lines(self) -> list[str]:
        """What it said, without colours."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.said)
        return [line.strip() for line in plain.splitlines() if line.strip()]

    def files(self) -> list[str]:
        """What the app wrote where it was run, without our own folder of runs."""
        inside = (each for each in self.place.rglob("*") if each.is_file())
        names = (str(each.relative_to(self.place)) for each in inside if not each.is_symlink())
        return sorted(name for name in names if not name.startswith(("runs/", "said.txt", ".")))


def command(arguments: list[str], place: Path, stand_ins: Path, limit: float) -> Ended:
    """Run a command in a fresh folder, beside the stand-ins and without any hub."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for each in stand_ins.iterdir():
        (place / each.name).symlink_to(each)
    environment = {
        **os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "HF_HOME": str(stand_ins.parent / "hub"),
        "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(stand_ins / "torch"), "WANDB_MODE": "offline",
        "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2",
        "FLWR_HOME": str(stand_ins.parent / "flwr"), "COLUMNS": "200", "NO_COLOR": "1",
    }  # fmt: skip
    started = time.perf_counter()
    with (place / "said.txt").open("w") as said:
        process = subprocess.Popen(
            arguments, cwd=place, env=environment, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its group is its own: what it started ends with it.
            stop(process)
    seconds = round(time.perf_counter() - started, 1)
    for each in place.iterdir():
        if each.is_symlink():
            each.unlink()
    return Ended(code, (place / "said.txt").read_text(errors="replace"), seconds, place)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that is left of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def atoll_verdict(ended: Ended) -> dict[str, Any]:
    """What a run of `atoll flower` comes to, by its exit, its run folder and its files."""
    row: dict[str, Any] = {"seconds": ended.seconds, "files": ended.files()}
    lines = ended.lines()
    row["last"] = lines[-8:]
    sentences = [line for line in lines if line.startswith("atoll: ")] or lines[-1:] or ["nothing"]
    folders = sorted((ended.place / "runs").glob("*/config.json"))
    if folders:
        run = read_run(folders[0].parent)
        lost = Counter(re.sub(r"^round \d+, client \d+: ", "", each) for each in run.refusals)
        row |= {
            "history": len(run.history), "metrics": run.metrics, "model": len(run.model),
            "measurements": run.history[-1].measurements if run.history else {},
            "lost": dict(lost),
        }  # fmt: skip
    why = reason_of(" ".join([*sentences, *row.get("lost", {})]))
    if ended.code is None:
        return {**row, "verdict": "failed", "why": f"not done after {ended.seconds:.0f} s"}
    if ended.code or row.get("lost"):
        sentence = next(iter(row.get("lost", {})), "") or sentences[0].removeprefix("atoll: ")
        verdict = "cannot run here" if why else "failed"
        return {**row, "verdict": verdict, "why": why or sentence[:400]}
    return {**row, "verdict": "ran", "why": ""}


def reason_of(said: str) -> str:
    """Why an example cannot run on this machine, if it is not the doing of who runs it."""
    other = re.search(r"the module '([^']+)', which (\S+ \S+) does not have", said)
    if other:
        return f"it is for another version of a package: {other[2]} has no {other[1]}"
    other = re.search(r"another version of what it imports: (cannot import [^(]+) \(", said)
    if other:
        return f"it is for another version of a package: {other[1]}"
    missing = re.search(r"(?:needs the module|No module named) '([^']+)'", said)
    if missing:
        return f"a package not installed: {missing[1]}"
    if re.search(r"OfflineMode|offline mode|URLError|ConnectionError|MaxRetryError", said):
        return "network data"
    return ""


def flower_verdict(ended: Ended) -> dict[str, Any]:
    """What Flower's simulation of an example comes to."""
    lines = ended.lines()
    lost = re.search(r"Received \d+ results and ([1-9]\d*) failures", ended.said)
    raised = [line for line in lines if re.search(r"\b\w+(Error|Exception): ", line)]
    row = {"seconds": ended.seconds, "files": ended.files(), "last": lines[-8:], "verdict": "ran"}
    if ended.code is None:
        return {**row, "verdict": "failed", "why": f"not done after {ended.seconds:.0f} s"}
    if ended.code or lost or "An exception was raised" in ended.said:
        return {**row, "verdict": "failed", "why": (raised or lines or ["nothing"])[-1][:400]}
    return row


def table(rows: list[dict[str, Any]], against: bool) -> str:
    """The verdicts in markdown."""
    head = "| example | clients | verdict | seconds |"
    lines = [head + (" under Flower | seconds |" if against else "")]
    lines.append("|---|---|---|---|" + ("---|---|" if against else ""))
    for row in rows:
        verdict = row["verdict"] + (f": {row['why']}" if row["why"] else "")
        cells = [row["example"], row.get("clients", ""), verdict, row.get("seconds", "")]
        if against:
            theirs = row.get("flower", {})
            why = f": {theirs['why']}" if "why" in theirs else ""
            cells += [theirs.get("verdict", "") + why, theirs.get("seconds", "")]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    counts = Counter(row["verdict"] for row in rows)
    return "\n".join([*lines, "", ", ".join(f"{verdict}: {n}" for verdict, n in counts.items())])


def about(options: argparse.Namespace) -> dict[str, Any]:
    """When, where and with what."""
    packages = (
        "flwr", "flwr-datasets", "datasets", "ray", "numpy", "torch", "torchvision", "scikit-learn",
        "xgboost", "catboost", "tensorflow-cpu", "jax", "flax", "mlx", "opacus", "monai", "fastai",
        "pytorch-lightning", "pennylane", "lifelines", "transformers", "evaluate",
    )  # fmt: skip
    return {
        "date": str(date.today()), "cores": os.cpu_count(), "machine": platform.processor(),
        "rounds": options.rounds, "limit": options.limit, "versions": dict(versions(packages)),
    }  # fmt: skip


def versions(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Versions of the packages that are there."""
    for name in packages:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def make_stand_ins(place: Path) -> None:
    """All data sets, models and metrics that examples ask a hub for, as folders of those names."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    rng = np.random.default_rng(0)
    for name, (column, side, channels, classes) in {
        "uoft-cs/cifar10": ("img", 32, 3, 10), "ylecun/mnist": ("image", 28, 1, 10),
        "zalando-datasets/fashion_mnist": ("image", 28, 1, 10),
        "nelorth/oxford-flowers": ("image", 64, 3, 102),
    }.items():  # fmt: skip
        rows = (("train", 600), ("test", 100)) if classes == 10 else (("train", 110), ("test", 20))
        for split, count in rows:
            label = rng.integers(classes, size=count)
            pictures = pictures_of(label, side, channels, rng)
            write(place / name, split, {column: pictures, "label": label.tolist()}, column)
    for split, count in (("train", 2000), ("test", 400)):
        # Half a million more: an example moves so many from here to its test data.
        many = count + 500_000 if split == "train" else count
        features = rng.normal(size=(many, 28)).astype(np.float32)
        label = (features[:, :4].sum(1) > 0).astype(np.float32)
        write(place / "jxie/higgs", split, {"inputs": features, "label": label})
        label = rng.integers(2, size=count)
        text = [f"{'a fine' if positive else 'a dull'} film, seen again" for positive in label]
        write(place / "stanfordnlp/imdb", split, {"text": text, "label": label.tolist()})
    for name, columns in tables(rng).items():
        write(place / name, "train", columns)
    for kind in range(6):
        folder = place / "MedNIST" / f"kind{kind}"
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures_of(np.full(20, kind), 64, 1, rng)):
            picture.save(folder / f"{number}.jpeg")
    make_nodes(place)
    (place / "accuracy").mkdir()
    (place / "accuracy" / "accuracy.py").write_text(ACCURACY)
    make_models(place)


def pictures_of(label: np.ndarray, side: int, channels: int, rng: np.random.Generator) -> list[Any]:
    """Pictures whose brightness over the rows tells their class, under noise."""
    from PIL import Image

    rows = np.linspace(0, np.pi, side)
    wave = 127 + 80 * np.sin(rows * (1 + label[:, None] % 10))
    pixels = wave[:, :, None, None] + rng.normal(0, 30, (len(label), side, side, channels))
    whole = pixels.clip(0, 255).astype(np.uint8)
    return [Image.fromarray(each.squeeze(-1) if channels == 1 else each) for each in whole]


def tables(rng: np.random.Generator) -> dict[str, dict[str, list[Any]]]:
    """Data sets of rows: irises, incomes and passengers."""

    def some(*values: Any, count: int = 1000) -> list[Any]:
        return [values[index] for index in rng.integers(len(values), size=count)]

    species = rng.integers(3, size=150)
    sizes = (np.array([[5.0, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3.0, 5.6, 2.0]])[species]
             + rng.normal(0, 0.2, (150, 4))).round(1)  # fmt: skip
    named = {name: sizes[:, number].tolist() for number, name in enumerate(
        ("sepal_length", "sepal_width", "petal_length", "petal_width"))}  # fmt: skip
    kinds = ("Iris-setosa", "Iris-versicolor", "Iris-virginica")
    short = {"sepal": "Sepal", "petal": "Petal", "_length": "LengthCm", "_width": "WidthCm"}
    hours = rng.integers(10, 80, size=1000)
    return {
        "hitorilabs/iris": {**named, "species": species.tolist()},
        "scikit-learn/iris": {
            "Id": list(range(1, 151)),
            **{re.sub("|".join(short), lambda part: short[part[0]], name): column
               for name, column in named.items()},
            "Species": [kinds[each] for each in species],
        },
        "scikit-learn/adult-census-income": {
            "age": rng.integers(17, 90, size=1000).tolist(),
            "workclass": some("Private", "State-gov", "?"),
            "fnlwgt": rng.integers(20000, 400000, size=1000).tolist(),
            "education": some("HS-grad", "Bachelors", "Masters"),
            "education.num": rng.integers(1, 17, size=1000).tolist(),
            "marital.status": some("Divorced", "Never-married", "Widowed"),
            "occupation": some("Sales", "Tech-support", "?"),
            "relationship": some("Husband", "Unmarried", "Wife"), "race": some("A", "B", "C"),
            "sex": some("Female", "Male"), "capital.gain": some(0, 0, 2000, 15000),
            "capital.loss": some(0, 0, 1900), "hours.per.week": hours.tolist(),
            "native.country": some("A", "B", "?"),
            "income": np.where(hours + rng.normal(0, 9, 1000) > 50, ">50K", "<=50K").tolist(),
        },
        "julien-c/titanic-survival": {
            "Survived": some(0, 1, count=300), "Pclass": some(1, 2, 3, count=300),
            "Name": some("Mr. A Smith", "Mrs. B Jones", "Miss. C Brown", count=300),
            "Sex": some("female", "male", count=300),
            "Age": rng.integers(1, 80, size=300).astype(float).tolist(),
            "Siblings/Spouses Aboard": some(0, 1, 2, count=300),
            "Parents/Children Aboard": some(0, 1, 2, count=300),
            "Fare": rng.gamma(2.0, 15.0, size=300).round(2).tolist(),
        },
    }  # fmt: skip


def make_nodes(place: Path) -> None:
    """What two SuperNodes have of their own: parts of two data sets, and a database of people."""
    from datasets import load_dataset

    for name in ("uoft-cs/cifar10", "zalando-datasets/fashion_mnist"):
        cache = str(place.parent / "cache")
        whole = load_dataset(str(place / name), split="train", cache_dir=cache)
        for number in range(2):
            part = whole.shard(2, number).train_test_split(test_size=0.2, seed=42)
            part.save_to_disk(place / "parts" / name.rpartition("/")[2] / str(number))
    features = ("age", "bmi", "systolic_bp", "diastolic_bp", "ldl_cholesterol", "hba1c")
    for number in range(2):
        people = np.random.default_rng(number).normal(50, 10, (100, len(features)))
        with contextlib.closing(sqlite3.connect(place / f"people-{number}.db")) as base:
            base.execute(f"create table person_measurements ({' real, '.join(features)} real)")
            base.executemany("insert into person_measurements values (?, ?, ?, ?, ?, ?)", people)
            base.commit()


def write(folder: Path, split: str, columns: dict[str, Any], picture: str = "") -> None:
    """One split of a data set, as `datasets.load_dataset` finds it in a folder."""
    from datasets import Dataset, Image

    data = Dataset.from_dict(columns)
    if picture:
        data = data.cast_column(picture, Image())
    folder.mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def make_models(place: Path) -> None:
    """Models that examples start from, with weights drawn anew; none where its library is not."""
    try:
        from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
    except ImportError:
        return
    folder = place / "prajjwal1" / "bert-tiny"
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "film", ",", "seen"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512,
    )  # fmt: skip
    BertForSequenceClassification(shape).save_pretrained(folder)
    try:
        import torch
        from torchvision.models import ViT_B_16_Weights, vit_b_16
    except ImportError:
        return
    weights = place / "torch" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    name = ViT_B_16_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(vit_b_16().state_dict(), weights / name)


if __name__ == "__main__":
    main()
