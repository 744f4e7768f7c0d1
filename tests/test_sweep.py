"""A sweep from the command line: what it prints, what it records, what it refuses."""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.commands import call
from tests.invariants import check_invariants
from tests.launching import SWEEP, Started, run, wait_until
from tests.stores import (
    dump,
    epochs,
    query,
    runs_of,
    seconds_until_quiet,
    told,
    trials_of,
)

RUN = [sys.executable, "-m", "pipeline.run"]
TRIALS = 6
# TPE after two random trials and ASHA from the third epoch on: what is drawn and what is pruned
# depends on all that went before.
REFERENCE = [
    "data=digits",
    "training.epochs=8",
    "model.hidden_units=tag(log, int(interval(8, 512)))",
    "sampler.n_startup_trials=2",
    "executor.workers=1",
    "sweep.name=reference",
]
BUDGET = f"sweep.trials={TRIALS}"


@dataclass(frozen=True)
class Ended:
    """A sweep that reached its budget."""

    folder: Path
    out: str
    err: str

    @property
    def trials(self) -> list[FrozenTrial]:
        return trials_of(self.folder, "reference")

    @property
    def best(self) -> FrozenTrial:
        complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return max(complete, key=lambda trial: trial.values[0])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("user")
    done = run(*REFERENCE, BUDGET, folder=folder)
    assert done.returncode == 0, done.stderr
    return Ended(folder, done.stdout, done.stderr)


def said(trials: list[FrozenTrial]) -> list[object]:
    """All of the trials that must not depend on interruptions."""
    return [
        (trial.number, trial.params, trial.values, trial.state.name, trial.intermediate_values)
        for trial in trials
    ]


# --- the result --------------------------------------------------------------------------


def test_a_sweep_ends_with_its_budget_and_stores_that_agree(ended: Ended) -> None:
    check_invariants(ended.folder, "reference", TRIALS)


def test_a_sweep_prints_its_name_and_a_line_a_trial(ended: Ended) -> None:
    assert f"\nSweep reference: 0 of {TRIALS} trials, 0 pruned; 1 at once.\n" in f"\n{ended.out}"
    lines = re.findall(r"^trial (\d+)  (complete|pruned) +(0\.\d{4}) .*hidden", ended.out, re.M)
    assert lines == [
        (str(trial.number), trial.state.name.lower(), f"{trial.value:.4f}")
        for trial in ended.trials
    ]


def test_a_sweep_ends_with_a_ranking_and_what_it_depends_on(ended: Ended) -> None:
    complete = [trial for trial in ended.trials if trial.state == TrialState.COMPLETE]
    (table,) = re.findall(
        rf"^Best of {len(complete)} complete trials\n(.+?)\n\n", ended.out, re.M | re.S
    )
    ranked = [line.split()[1:3] for line in table.splitlines()[1:]]
    best_first = sorted(complete, key=lambda trial: (-trial.values[0], trial.number))
    assert ranked == [[str(trial.number), f"{trial.values[0]:.4f}"] for trial in best_first[:5]]
    baseline = f"{ended.trials[0].values[0]:.4f}"
    (against,) = re.findall(
        rf"^Baseline, as configured \(trial 0\): {baseline}[,;] (.*)\.$", ended.out, re.M
    )
    noise = r"\(±0\.\d{4}\): (within|beyond) the noise of the 240 validation images"
    assert re.fullmatch(rf"which nothing surpassed|the best is 0\.\d{{4}} better {noise}", against)
    shares = re.findall(r"^ *(model|optimizer)\.\w+ .*(\d\.\d\d) *$", ended.out, re.M)
    assert sum(float(share) for _, share in shares) == pytest.approx(1.0, abs=0.02)


def test_outside_a_terminal_a_sweep_writes_plain_lines_and_no_error(ended: Ended) -> None:
    assert "\x1b" not in ended.out
    assert "\r" not in ended.out
    assert ended.err == ""


def test_a_sweep_ends_with_the_command_that_shows_it(ended: Ended) -> None:
    (parent,) = [run.run_id for run in runs_of(ended.folder, "reference") if "kind" in run.tags]

    assert ended.out.endswith(
        f"\nSee the report, the trials and charts of them: python -m pipeline.ui run={parent}\n"
    )


def test_a_sweep_writes_to_its_stores_alone(ended: Ended) -> None:
    assert [path.name for path in ended.folder.iterdir()] == ["mlruns"]


def test_a_trial_never_looks_at_the_test_split(ended: Ended) -> None:
    runs = runs_of(ended.folder, "reference")

    assert [run.run_id for run in runs if "test_split" in run.tags] == []
    assert [name for run in runs for name in run.metrics if name.startswith("test")] == []


def test_the_printed_command_repeats_the_best_trial_bit_for_bit(
    ended: Ended, tmp_path: Path
) -> None:
    (number, command) = re.findall(
        r"^Repeat trial (\d+), .*: python -m pipeline\.run (.*)$", ended.out, re.M
    )[0]

    done = call(*shlex.split(command), folder=tmp_path, command=RUN)

    assert done.returncode == 0, done.stderr
    sql = "SELECT value FROM latest_metrics WHERE key = 'best_val_accuracy'"
    repeated = query(tmp_path / "mlruns" / "mlflow.db", sql)
    assert (int(number), repeated) == (ended.best.number, [(ended.best.values[0],)])


def test_the_command_of_each_run_repeats_its_trial_without_the_test_split(ended: Ended) -> None:
    commands = {run.run_id: run.tags["command"] for run in runs_of(ended.folder, "reference")}

    for trial in ended.trials:
        words = shlex.split(commands[trial.user_attrs["run_id"]])
        assert words[:3] == ["python", "-m", "pipeline.run"]
        assert {f"{name}={value}" for name, value in trial.params.items()} < set(words)
        assert words[-1] == "evaluate_test=false"


# --- the same name again -----------------------------------------------------------------


def test_a_finished_sweep_prints_its_result_again_and_changes_nothing(ended: Ended) -> None:
    before = dump(ended.folder)

    done = call(*REFERENCE, BUDGET, folder=ended.folder)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ended.out
    assert dump(ended.folder) == before


def test_a_larger_budget_extends_a_finished_sweep_to_exactly_it(
    ended: Ended, tmp_path: Path
) -> None:
    shutil.copytree(ended.folder / "mlruns", tmp_path / "mlruns")

    done = call(*REFERENCE, f"sweep.trials={TRIALS + 2}", folder=tmp_path)

    assert done.returncode == 0, done.stderr
    check_invariants(tmp_path, "reference", TRIALS + 2)
    assert said(trials_of(tmp_path, "reference")[:TRIALS]) == said(ended.trials)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            "model.dropout_rate=interval(0.0, 0.4)",
            "search.space['model.dropout_rate']: interval(0.0, 0.5) -> interval(0.0, 0.4)",
        ),
        ("sweep.objective=val_loss", "sweep.objective: val_accuracy -> val_loss"),
        ("data.train_size=500", "data: "),
        ("training.epochs=9", "training.epochs: 8 -> 9"),
    ],
)
def test_a_sweep_that_was_started_differently_is_refused_with_the_difference(
    ended: Ended, change: str, difference: str
) -> None:
    before = dump(ended.folder)

    done = call(*REFERENCE, f"sweep.trials={TRIALS + 1}", change, folder=ended.folder)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sweep.name=reference was started differently: " in done.stderr
    assert difference in done.stderr
    assert dump(ended.folder) == before


def test_a_sweep_killed_anywhere_ends_as_if_it_had_not_been(ended: Ended, tmp_path: Path) -> None:
    """Within a trial, between two, and after the last one is told but the sweep not ended."""
    moments = [
        lambda: epochs(tmp_path, 0) >= 2,
        lambda: told(tmp_path) >= 2,
        lambda: told(tmp_path) >= TRIALS,
    ]
    for moment in moments:
        with Started(*SWEEP, *REFERENCE, BUDGET, folder=tmp_path) as started:
            wait_until(moment)
            started.process.kill()
            assert started.end() == -9
        assert seconds_until_quiet(tmp_path, limit=5.0) < 5.0

    done = call(*REFERENCE, BUDGET, folder=tmp_path)

    assert done.returncode == 0, done.stderr
    assert said(trials_of(tmp_path, "reference")) == said(ended.trials)
    check_invariants(tmp_path, "reference", TRIALS)


# --- other ways to search ----------------------------------------------------------------


def test_several_objectives_end_with_the_pareto_front_and_time_can_be_added(
    tmp_path: Path,
) -> None:
    command = [
        "data=digits",
        "training.epochs=20",
        "model.hidden_units=choice(4, 32, 128)",
        "sweep.objective=[val_accuracy, parameters]",
        "sampler=random",
        "pruner=none",
        "sweep.first=[{model.hidden_units: 4}, {model.hidden_units: 128}]",
        "sweep.trials=3",
        "executor.workers=1",
        "sweep.name=front",
    ]

    short = call(*command, "sweep.timeout=0.1", folder=tmp_path)
    whole = call(*command, "sweep.timeout=600", folder=tmp_path)

    assert (short.returncode, short.stderr) == (0, "")
    assert "The time is up after 0 of 3 trials" in short.stdout
    assert (whole.returncode, whole.stderr) == (0, "")
    check_invariants(tmp_path, "front", 3)
    trials = trials_of(tmp_path, "front")
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    (table,) = re.findall(r"^Pareto front\n(.+?)\n\n", whole.stdout, re.M | re.S)
    front = [line.split()[1:4] for line in table.splitlines()[1:]]
    better = [
        [str(trial.number), f"{trial.values[0]:.4f}", f"{trial.values[1]:,.0f}"]
        for trial in trials
        if not any(dominates(other.values, trial.values) for other in trials)
    ]
    assert sorted(front) == sorted(better)
    assert whole.stdout.count("\nRepeat trial ") == len(front)


def dominates(one: list[float], other: list[float]) -> bool:
    """Whether an accuracy is no lower for no more parameters, and one of them is better."""
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = call("data=digits", "sweep.dry_run=true", folder=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"^model\.hidden_units +tag\(log, int\(interval\(32, 1024\)\)\)", done.stdout, re.M
    )
    assert "\n8 corners of the space compose and pass every check.\n" in done.stdout
    assert re.search(r"^smallest +3,466 .*hidden_units=32", done.stdout, re.M)
    assert re.search(r"^largest +1,126,410 .*hidden_units=1024", done.stdout, re.M)
    assert re.search(r"^30 trials, \d+ at once: .* of disk, .* of memory\.$", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_what_the_space_fixes(tmp_path: Path) -> None:
    fixed = "+search.space={model.batch_normalization: true}"

    done = call("data=digits", fixed, "sweep.dry_run=true", folder=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^model\.batch_normalization +fixed: true *$", done.stdout, re.M)


@pytest.mark.parametrize(
    ("argument", "tells"),
    [
        ("model.hidden_unit=3", "did you mean model.hidden_units?"),
        ("sampler=tpee", "sampler=tpee: no such option among"),
        ("sweep.trials=0", "sweep.trials must be at least 1, got 0."),
        ("sweep.objective=test_accuracy", "sweep.objective must be one of val_accuracy"),
        ("sweep.name=../x", "sweep.name must"),
        ("model.dropout_rate=interval(0.9, 0.1)", "model.dropout_rate=interval(0.9, 0.1): "),
        ("model.hidden_units=tag(log, int(interval(0, 9)))", "model.hidden_units=tag(log, int("),
        ("model.width=interval(1, 5)", "model.width: no such key"),
        ("model.activation=choice()", "model.activation=choice()"),
        ("model.dropout_rate=interval(0.0, 1.0)", "model.dropout_rate must be in [0, 1), got 1.0"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_stored(
    tmp_path: Path, argument: str, tells: str
) -> None:
    done = call("data=digits", argument, folder=tmp_path)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert tells in done.stderr
    assert list(tmp_path.iterdir()) == []
