"""What a sweep costs, beside the loops that most people write.

    MNIST_NPZ=mnist.npz python -m tests.benchmarks.sweep    # a quarter of an hour; see --help

The same 12 trials, each contestant in a process and a folder of its own, start-up included: 20,000
images of MNIST, 5,000 for validation, two hidden layers, 4 epochs of batch 128, RMSprop.

- a: Optuna's `optimize` around stock Keras `fit` (float images, one-hot labels, TensorFlow's own
  number of threads), nothing recorded.
- b: the same, recorded by MLflow's autologging for Keras 3 with its defaults, in SQLite.
- c: `python -m sweeps.run` with two workers, without pruning; d: the same with `pruner=asha` from
  the first epoch; e: as c, with one worker; f: as c, on a Ray cluster that it starts.
- g: Ray Tune around the same `fit`, two trials at once of one thread each, a checkpoint an epoch in
  its own folder, recorded by its callback for MLflow; j: the same with ASHA, which looks after the
  epochs that d does, 1 and 3.
- h: Keras Tuner around the same `fit`, one trial after the other; MLflow records nothing.

Who is not installed is left out (`pip install 'ray[tune]' keras-tuner tensorboard`). Hydra's Optuna
sweeper is missing: up to 1.3.0 it wants Optuna before 3; 1.4.0rc3, the first for ours, Hydra 1.4.

The images of ours, c to f, are our own stratified draw, those of the others the first 25,000. The
value of a trial is its best `val_accuracy` of an epoch; one that d has pruned has none, one that j
has stopped has. "others": processor time of all else on the machine meanwhile, for g and j with
that of Ray's workers, which it does not pass on; "to least best": until the end of a trial of the
lowest of the contestants' best values, "to 0.96": of that value; "as fast as": ratios of wall time;
"from first trial on": of ours, from its start. Of several rounds the medians are shown.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
TRIALS, TRAIN, VALIDATION, EPOCHS = 12, 20_000, 5_000, 4
TARGET = 0.96  # validation accuracy
UNITS, DROPOUT, RATE = "model.hidden_units", "model.dropout_rate", "optimizer.learning_rate"
CONTESTANTS = {
    "a": "a: Optuna, stock Keras fit",
    "b": "b: the same, MLflow autologging",
    "c": "c: sweeps.run",
    "d": "d: sweeps.run, pruner=asha",
    "e": "e: sweeps.run, one worker",
    "f": "f: sweeps.run, executor=ray",
    "g": "g: Ray Tune, MLflow",
    "h": "h: Keras Tuner",
    "j": "j: Ray Tune, MLflow, ASHA",
}
NEEDS = {
    "f": ["ray"],
    "g": ["ray", "fsspec"],
    "h": ["keras-tuner", "tensorboard"],
    "j": ["ray", "fsspec"],
}
OURS = {
    "c": ["pruner=none", "executor.workers=2"],
    "d": ["pruner=asha", "pruner.min_resource=1", "executor.workers=2"],
    "e": ["pruner=none", "executor.workers=1"],
    "f": ["pruner=none", "executor=ray", "executor.workers=2"],
}
_PR_SET_CHILD_SUBREAPER = 36  # of Linux
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # or the network is measured
    "MNIST_NPZ": str(Path(os.environ.get("MNIST_NPZ", "mnist.npz")).resolve()),
    "PYTHONPATH": str(ROOT),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # by Ray's source, to listen on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # or Ray's workers step back behind all else on the machine
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Sweep:
    """What the 12 trials cost a contestant, in seconds."""

    contestant: str
    wall: float  # from the start of the process to its end
    processor: float  # of all its processes
    others: float  # of the processor, by all other processes meanwhile
    finished: list[tuple[float, float]]  # of each complete trial: since the start; value
    overhead: float | None  # of a worker, a trial, beyond its training
    begun: float | None  # of the first trial, since the start


def draw_points() -> list[dict[str, float]]:
    """The 12 trials, the same in every run, by our dotted names."""
    uniform, points = np.random.default_rng(0).uniform, []
    for _ in range(TRIALS):
        units = round(np.exp(uniform(np.log(64), np.log(1024))))
        dropout, rate = round(uniform(0, 0.5), 3), float(f"{10 ** uniform(-4, -2):.3g}")
        points.append({UNITS: units, DROPOUT: dropout, RATE: rate})
    return points


def load_data() -> dict[str, Any]:
    """What Keras' `fit` is given, whoever calls it."""
    import keras

    with np.load(os.environ["MNIST_NPZ"]) as arrays:
        images, labels = (arrays[name][: TRAIN + VALIDATION] for name in ("x_train", "y_train"))
    x = images.reshape(-1, 784).astype("float32") / 255
    y = keras.utils.to_categorical(labels, 10)
    data = {"x": x[:TRAIN], "y": y[:TRAIN], "validation_data": (x[TRAIN:], y[TRAIN:])}
    return data | {"batch_size": 128, "epochs": EPOCHS, "verbose": 0}


def build_model(point: Mapping[str, float]) -> Any:
    import keras

    model = keras.Sequential([keras.Input((784,))])
    for _ in range(2):
        model.add(keras.layers.Dense(point[UNITS], activation="relu"))
        model.add(keras.layers.Dropout(point[DROPOUT]))
    model.add(keras.layers.Dense(10, activation="softmax"))
    optimizer = keras.optimizers.RMSprop(point[RATE])
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    return model


def build_objective() -> Callable[[optuna.Trial], float]:
    """Loads the images; a trial is then stock Keras."""
    data = load_data()

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int(UNITS, 64, 1024, log=True)
        trial.suggest_float(DROPOUT, 0.0, 0.5)
        trial.suggest_float(RATE, 1e-4, 1e-2, log=True)
        return float(max(build_model(trial.params).fit(**data).history["val_accuracy"]))

    return objective


def report(value: float | None) -> None:
    """Prints the time and the value, at the end of a trial."""
    print(json.dumps([time.time(), value]), flush=True)


def optimize(objective: Callable[[optuna.Trial], float]) -> None:
    study = optuna.create_study(direction="maximize")
    for point in draw_points():
        study.enqueue_trial(point)
    callbacks = [lambda _, trial: report(trial.value)]
    study.optimize(objective, n_trials=TRIALS, callbacks=callbacks)


def run_bare() -> None:
    optimize(build_objective())


def run_autologged() -> None:
    import mlflow

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.keras.autolog()
    objective = build_objective()

    def recorded(trial: optuna.Trial) -> float:
        with mlflow.start_run(nested=True):
            value = objective(trial)
            mlflow.log_params(trial.params)
            return value

    with mlflow.start_run():
        optimize(recorded)


def run_ray_tune(scheduler: Any = None) -> None:
    """Ray Tune, as its documentation has it for Keras and for MLflow."""
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.basic_variant import BasicVariantGenerator

    class Report(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            report(trial.metric_analysis["val_accuracy"]["max"])

    def train(config: dict[str, float], data: dict[str, Any]) -> None:
        import tensorflow as tf
        from ray.tune.integration.keras import TuneReportCheckpointCallback

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        build_model(config).fit(**data, callbacks=[TuneReportCheckpointCallback()])

    ray.init(num_cpus=2)
    recorder = MLflowLoggerCallback(
        "sqlite:///mlflow.db", experiment_name="benchmark", save_artifact=True
    )
    tune.Tuner(
        tune.with_parameters(train, data=load_data()),
        param_space={
            UNITS: tune.lograndint(64, 1024),
            DROPOUT: tune.uniform(0.0, 0.5),
            RATE: tune.loguniform(1e-4, 1e-2),
        },
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            num_samples=TRIALS,
            search_alg=BasicVariantGenerator(points_to_evaluate=draw_points()),
            scheduler=scheduler,
            reuse_actors=True,  # not the default, with which each trial imports TensorFlow
        ),
        run_config=tune.RunConfig(
            storage_path=str(Path.cwd()), callbacks=[recorder, Report()], verbose=0
        ),
    ).fit()


def run_ray_tune_asha() -> None:
    from ray.tune.schedulers import ASHAScheduler

    run_ray_tune(ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=3))


def run_keras_tuner() -> None:
    """A grid of one number, the index of a point."""
    import keras
    import keras_tuner

    class Report(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, logs: object = None) -> None:
            report(max(self.model.history.history["val_accuracy"]))

    points = draw_points()
    tuner = keras_tuner.GridSearch(
        lambda values: build_model(points[values.Int("point", 0, TRIALS - 1)]),
        objective="val_accuracy",
        directory=".",
    )
    tuner.search(**load_data(), callbacks=[Report()])


RIVALS = {
    "a": run_bare,
    "b": run_autologged,
    "g": run_ray_tune,
    "h": run_keras_tuner,
    "j": run_ray_tune_asha,
}


def our_command(settings: list[str]) -> list[str]:
    points = (",".join(f"{name}:{value!r}" for name, value in p.items()) for p in draw_points())
    first = ",".join(f"{{{point}}}" for point in points)
    return [
        *(sys.executable, "-m", "sweeps.run", "data=mnist", "sweep.name=benchmark"),
        *(f"data.train_size={TRAIN}", f"data.validation_size={VALIDATION}"),
        *(f"training.epochs={EPOCHS}", "training.early_stopping_patience=null", *settings),
        *(f"sweep.trials={TRIALS}", f"sweep.first=[{first}]"),
        f"{UNITS}=tag(log, int(interval(64, 1024)))",
        f"{DROPOUT}=interval(0.0, 0.5)",
        f"{RATE}=tag(log, interval(1e-4, 1e-2))",
    ]


def read_trials(folder: Path) -> list[tuple[float, float, float]]:
    """Of each complete trial of ours: start and end, in seconds since 1970; value."""
    storage = f"sqlite:///{folder}/mlruns/optuna.db"
    trials: list[Any] = optuna.load_study(study_name="benchmark", storage=storage).trials
    if sorted(trial.params[RATE] for trial in trials) != sorted(p[RATE] for p in draw_points()):
        sys.exit(f"sweeps.run trained other points: {[trial.params for trial in trials]}")
    trials = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return [
        (t.datetime_start.timestamp(), t.datetime_complete.timestamp(), t.value) for t in trials
    ]


def is_installed(contestant: str) -> bool:
    """Whether all is there that only some contestants need; prints what is missing."""
    missing = [name for name in NEEDS.get(contestant, []) if not any(distributions(name=name))]
    if missing:
        print(f"{CONTESTANTS[contestant]}: left out, not installed: {', '.join(missing)}")
    return not missing


def adopt_orphans() -> None:
    """Has the kernel make this process the parent of descendants whose own parent has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def processor_times() -> npt.NDArray[np.float64]:
    """Seconds of the processor: of ended descendants, and of the whole machine."""
    psutil.wait_procs(psutil.Process().children(), timeout=10)  # or they do not count
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([sum(children[:2]), sum(psutil.cpu_times()[:3])])  # user, (nice,) system


def measure(contestant: str) -> Sweep:
    """Runs a contestant; exits with its output if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.sweep", "--contestant", contestant]
    if contestant in OURS:
        command = our_command(OURS[contestant])
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), os.environ | ENVIRONMENT
        spent, started, clock = processor_times(), time.time(), time.perf_counter()
        ended = subprocess.run(
            command, check=False, cwd=folder, env=environment, capture_output=True, text=True
        )
        wall, spent = time.perf_counter() - clock, processor_times() - spent
        if ended.returncode:
            sys.exit(f"{contestant} failed: {command}\n{ended.stdout}\n{ended.stderr}")
        lines = [json.loads(line) for line in ended.stdout.splitlines() if line[:2] == "[1"]
        trials = read_trials(folder) if contestant in OURS else []
        ends = [trial[1:] for trial in trials] if trials else lines
        beyond = re.search(r"Beyond training: ([\d.]+) s", ended.stdout)
        overhead = float(beyond[1]) if beyond else None
    finished = [(seconds - started, value) for seconds, value in ends]
    begun = min(trial[0] for trial in trials) - started if trials else None
    return Sweep(contestant, wall, spent[0], spent[1] - spent[0], finished, overhead, begun)


def to_figures(sweep: Sweep, turns: list[Sweep]) -> list[float]:
    """The row of a sweep, among all of its round."""
    bests = {turn.contestant: max(value for _, value in turn.finished) for turn in turns}
    reached = [
        min((seconds for seconds, value in sweep.finished if value >= goal), default=np.nan)
        for goal in (min(bests.values()), TARGET)
    ]
    ratios = [turn.wall / sweep.wall for turn in turns if turn.contestant in RIVALS]
    rest = np.nan if sweep.begun is None else sweep.wall - sweep.begun
    best = bests[sweep.contestant]
    return [sweep.wall, rest, sweep.processor, sweep.others, best, *reached, *ratios]


def build_table(rounds: list[list[Sweep]]) -> Table:
    needed = [name for sweep in rounds[0] for name in NEEDS.get(sweep.contestant, [])]
    names = dict.fromkeys(["tensorflow", "keras", "optuna", "mlflow", *needed])
    versions = [f"{name} {version(name)}" for name in names]
    caption = ", ".join([f"{os.cpu_count()} processors", platform.platform(), *versions])
    table = Table(title=f"{TRIALS} trials, rounds: {len(rounds)}", caption=caption)
    ratios = [f"as fast as {s.contestant}" for s in rounds[0] if s.contestant in RIVALS]
    heads = ("", "wall s", "from first trial on s", "processor s", "others s", "best")
    for head in (*heads, "to least best s", f"to {TARGET} s", *ratios):
        table.add_column(head, justify="right" if head else "left", no_wrap=not head)
    figures = [[to_figures(sweep, turns) for sweep in turns] for turns in rounds]
    digits = (1, 1, 1, 1, 4, 1, 1, *(2 for _ in ratios))
    for sweep, row in zip(rounds[0], np.median(figures, axis=0), strict=True):
        cells = [f"{value:.{places}f}" for value, places in zip(row, digits, strict=True)]
        table.add_row(CONTESTANTS[sweep.contestant], *cells)
    return table


def best_so_far(sweep: Sweep) -> tuple[list[float], list[float]]:
    """Seconds since the start at which a trial was complete, and at the end; the best by then."""
    seconds, values = zip(*sorted(sweep.finished), strict=True)
    best = np.maximum.accumulate(values).tolist()
    return [*seconds, sweep.wall], [*best, best[-1]]


def draw(rounds: list[list[Sweep]], path: Path) -> None:
    """The best value so far over time: a line for each contestant and round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for turn, sweeps in enumerate(rounds):
        for colour, sweep in enumerate(sweeps):
            label = "" if turn else CONTESTANTS[sweep.contestant]
            axes.step(*best_so_far(sweep), where="post", color=f"C{colour}", alpha=0.7, label=label)
    axes.axhline(TARGET, color="grey", linestyle=":", label=f"{TARGET}")
    axes.set(xlabel="seconds since the start of the command", ylabel="best val_accuracy so far")
    axes.set(title=f"{TRIALS} trials, rounds: {len(rounds)}", xlim=(0, None))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares ways to do the same 12 trials.")
    parser.add_argument("--rounds", type=int, default=1, help="in each, the contestants take turns")
    parser.add_argument(
        "--only", default=",".join(CONTESTANTS), help="contestants, separated by commas"
    )
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--plot", type=Path, help="file for a picture (.svg or .png)")
    parser.add_argument("--contestant", choices=RIVALS, help="run it here, in this process")
    options = parser.parse_args()
    if options.contestant:
        RIVALS[options.contestant]()
        return
    contestants = [name for name in options.only.split(",") if is_installed(name)]
    if not contestants:
        return
    adopt_orphans()
    rounds = [[measure(name) for name in contestants] for _ in range(options.rounds)]
    if options.json:
        options.json.write_text(json.dumps(rounds, default=asdict, indent=1) + "\n")
    Console(width=160).print(build_table(rounds))
    turns = [turn for turns in rounds for turn in turns if turn.contestant == "c"]
    if overheads := [turn.overhead for turn in turns if turn.overhead is not None]:
        print(f"c: {np.median(overheads):.2f} s of a worker a trial beyond its training, median")
    if options.plot:
        draw(rounds, options.plot)


if __name__ == "__main__":
    main()
