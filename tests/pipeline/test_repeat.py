"""Runs repeated: real ones, in real stores, and what is said of them."""

import gc
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from mlflow import MlflowClient
from sklearn.datasets import load_digits

from pipeline.compose import CONF, VARIANTS, to_typed
from pipeline.config import LATER, RepeatConfig, RunConfig, flatten
from pipeline.registry import logged_model
from pipeline.repeat import (
    CLOSE,
    DIFFERENT,
    EXACT,
    Repetition,
    Trained,
    Verdict,
    differences,
    find,
    first_difference,
    judge,
    main,
    prepare,
    repeat,
)
from pipeline.run import execute_run
from pipeline.store import Recorded, open_store, read_run, search
from pipeline.tracking import create_run
from tests.commands import call
from tests.launching import run
from tests.stores import parent_of, query

COMMAND = "python -m pipeline.run data=digits"
REPEAT = [sys.executable, "-m", "pipeline.repeat"]
# What may differ between two runs of one test: the code is being worked on.
CODE = {"git.commit", "git.dirty"}

Configure = Callable[..., RunConfig]
Execute = Callable[..., str]
Change = Callable[[dict[str, Any]], object]


# --- a store of one's own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repeat")


@pytest.fixture(scope="module")
def execute(tensorflow: None, configure: Configure, folder: Path) -> Execute:
    """Executes a short run and gives its id."""

    def execute(*overrides: str) -> str:
        short = ["data=digits", "training=quick", "model.hidden_units=16", "evaluate_test=false"]
        where = [f"tracking.directory={folder / 'mlruns'}", "tracking.figures=false"]
        return execute_run(configure(*short, *where, *overrides), COMMAND).run_id

    return execute


@pytest.fixture(scope="module")
def plain(execute: Execute) -> str:
    """A run that is left as it is."""
    return execute("seed=1")


@pytest.fixture
def configuration(plain: str, folder: Path) -> Iterator[Path]:
    """What is recorded of the settings of `plain`, to be changed."""
    (path,) = folder.rglob(f"{plain}/artifacts/config.yaml")
    text = path.read_text()
    yield path
    path.write_text(text)


def request(folder: Path, run_id: str, *overrides: str) -> RepeatConfig:
    where = f"tracking.directory={folder / 'mlruns'}"
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("repeat", [f"run={run_id}", where, *overrides])
    return to_typed(cfg, RepeatConfig, VARIANTS)


def repeated(folder: Path, run_id: str, *overrides: str) -> tuple[Repetition, Recorded, Verdict]:
    """Repeats a run in this process: what was known before, the run it became, the verdict."""
    repetition = prepare(*find(request(folder, run_id, *overrides)))
    done, verdict = repeat(repetition, "python -m pipeline.repeat")
    return repetition, read_run(done.run_id), verdict


def rewrite(path: Path, change: Change) -> None:
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))


def write_npz(path: Path, images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]) -> str:
    """Three quarters for training."""
    cut = len(images) * 3 // 4
    np.savez(
        path, x_train=images[:cut], y_train=labels[:cut], x_test=images[cut:], y_test=labels[cut:]
    )
    return str(path)


# --- what commands say -------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a sweep of two trials that repetitions may be recorded in."""
    folder = tmp_path_factory.mktemp("swept")
    settings = ["data=digits", "model.hidden_units=32", "training.epochs=3", "pruner=none"]
    done = call(
        *settings, "sweep.trials=2", "sweep.name=short", "executor.workers=1", folder=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trial(swept_here: Path) -> str:
    """The last one, which a worker executed after another."""
    sql = "SELECT run_uuid FROM tags WHERE key = 'trial' AND value = '1'"
    return str(query(swept_here / "mlruns" / "mlflow.db", sql)[0][0])


def test_a_trial_that_a_worker_executed_is_repeated_exactly(swept_here: Path, trial: str) -> None:
    done = call(f"run={trial}", folder=swept_here, command=REPEAT)

    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 3 of 3" in done.stdout
    assert "\nEXACT: the metrics of all 3 epochs and all weights are the same" in done.stdout
    found = f"SELECT value FROM tags WHERE key = 'repeats' AND value = '{trial}'"
    assert query(swept_here / "mlruns" / "mlflow.db", found) == [(trial,)]


def test_other_threads_are_named_before_the_training_and_in_the_verdict(
    swept_here: Path, trial: str
) -> None:
    done = run(f"run={trial}", "training.threads=2", folder=swept_here, command=REPEAT)

    before, _, after = done.stdout.partition("\nepoch 1 of 3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nDiffers: training.threads: 1 then, 2 now." in before
    assert "\nFirst input that differs: training.threads: 1 then, 2 now.\n" in after


def test_the_run_of_a_sweep_is_refused_with_the_way_to_its_trials(swept_here: Path) -> None:
    sweep = parent_of(swept_here, "short").run_id

    with pytest.raises(ValueError, match=rf"is that of a sweep.* pipeline\.ui run={sweep}"):
        find(request(swept_here, sweep))


def test_a_repetition_of_no_run_ends_in_one_line(tmp_path: Path) -> None:
    done = call(folder=tmp_path, command=REPEAT)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: run must be the id of a recorded run, got None.\n"
    assert list(tmp_path.iterdir()) == []


# --- a repetition ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.compile=always", "model.hidden_layers=1"],
        ["data.validation_size=0", "evaluate_test=true", "model.batch_normalization=true"],
        ["training.epochs=20", "training.early_stopping_patience=1", "data.train_size=300"],
    ],
    ids=" ".join,
)
def test_equal_inputs_come_to_the_same(
    execute: Execute, folder: Path, overrides: list[str]
) -> None:
    repetition, _, verdict = repeated(folder, execute(*overrides))

    assert verdict.word == EXACT
    assert set(repetition.differences) <= CODE


def test_a_repetition_is_a_run_of_its_own_that_can_be_found(plain: str, folder: Path) -> None:
    _, done, _ = repeated(folder, plain)

    of = read_run(plain)
    assert done.run_id != plain
    assert (done.status, done.name) == ("FINISHED", f"repeat of {of.name}")
    assert (done.experiment_id, done.parent) == (of.experiment_id, None)
    assert (done.tags["repeats"], done.tags["repeat.verdict"]) == (plain, EXACT)
    assert done.tags["repeat.difference"] in CODE | {"none"}
    assert done.tags["mlflow.note.content"].startswith("EXACT: ")
    assert done.params["model.hidden_units"] == "16"
    assert "repeats" not in of.tags


def test_a_repetition_spends_no_look_at_the_test_split(execute: Execute, folder: Path) -> None:
    looked = execute("evaluate_test=true")

    _, done, _ = repeated(folder, looked)

    assert "test_accuracy" in read_run(looked).metrics
    assert "test_accuracy" not in done.metrics
    assert "test_split" not in done.tags


def test_a_run_that_was_interrupted_and_gone_on_with_is_repeated_exactly(
    execute: Execute, configure: Configure, folder: Path, tmp_path: Path
) -> None:
    where = [f"tracking.directory={folder / 'mlruns'}", "tracking.figures=false"]
    short = ["data=digits", "training=quick", "model.hidden_units=16", "evaluate_test=false"]
    config = configure(*short, *where)
    interrupted = create_run(open_store(config.tracking), "interrupted", {})
    given: dict[str, Any] = {"into": interrupted, "checkpoint": tmp_path / "checkpoint"}
    with pytest.raises(KeyboardInterrupt):
        execute_run(config, COMMAND, on_epoch_end=interrupt_after_the_second, **given)
    interrupted.reopen()
    execute_run(config, COMMAND, **given)

    _, _, verdict = repeated(folder, interrupted.run_id)

    assert verdict.word == EXACT


def interrupt_after_the_second(epoch: int, metrics: dict[str, float]) -> None:
    if epoch == 2:
        raise KeyboardInterrupt


def test_a_repetition_that_is_interrupted_is_killed_and_says_of_which_run_it_is(
    execute: Execute, folder: Path
) -> None:
    of = execute("seed=5")
    repetition = prepare(*find(request(folder, of)))

    with pytest.raises(KeyboardInterrupt):
        repeat(repetition, COMMAND, on_epoch_end=interrupt_after_the_second)

    (done,) = search(f"tags.repeats = '{of}'")
    assert done.status == "KILLED"
    assert "repeat.verdict" not in done.tags


def test_another_seed_on_the_same_images_is_named_and_compared_on_them(
    plain: str, folder: Path, configuration: Path
) -> None:
    rewrite(configuration, lambda settings: settings.update(seed=2))

    repetition, done, verdict = repeated(folder, plain)

    assert next(iter(repetition.differences.values())) == "seed: 1 then, 2 now"
    assert done.tags["repeat.difference"] == "seed"
    assert verdict.word in (CLOSE, DIFFERENT)
    assert "on the same 240 images" in verdict.reason
    assert verdict.details[0].startswith("First difference: loss of epoch 1: ")


# --- other data --------------------------------------------------------------------------


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """A command ends with its process: it leaves out of garbage collection what it imported."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def digits() -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    bunch = load_digits()
    return bunch.images, bunch.target


def of_file(path: str) -> list[str]:
    return ["data=npz", f"data.path={path}", "data.pixel_max=16"]


@pytest.mark.usefixtures("unfrozen")
def test_one_changed_image_is_different_and_ends_with_status_4(
    execute: Execute,
    folder: Path,
    tmp_path: Path,
    digits: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, labels = digits
    of = execute(*of_file(write_npz(tmp_path / "then.npz", images, labels)))
    changed = images.copy()
    changed[3] = 16 - changed[3]
    now = write_npz(tmp_path / "now.npz", changed, labels)

    with pytest.raises(SystemExit) as ended:
        main(request(folder, of, f"data.path={now}"), [f"run={of}"])

    said = capsys.readouterr().out
    before, _, after = said.partition("\nepoch 1 of 3")
    assert ended.value.code == 4
    assert "\nDiffers: data.sha256: " in before
    assert "\nDiffers: split.train: " in before
    assert "\nDIFFERENT: they have no validation images in common" in after
    assert "\nFirst input that differs: data.sha256: " in after
    assert "\nFirst difference: loss of epoch 1: " in after
    assert "\nLargest difference of a weight: " in after


def test_the_same_data_may_have_moved(
    execute: Execute,
    folder: Path,
    tmp_path: Path,
    digits: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]],
) -> None:
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    of = execute(*of_file(write_npz(old, *digits)))
    old.rename(new)

    with pytest.raises(ValueError, match=r"data\.path: no file .*old\.npz"):
        prepare(*find(request(folder, of)))
    repetition, _, verdict = repeated(folder, of, f"data.path={new}")

    assert verdict.word == EXACT
    assert set(repetition.differences) <= CODE


def test_a_file_for_digits_that_are_in_none_is_refused(plain: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=my\.npz: the digits of this run are in no"):
        find(request(folder, plain, "data.path=my.npz"))


def test_a_repetition_that_diverges_is_different(
    execute: Execute, folder: Path, tmp_path: Path
) -> None:
    """One enormous step: on black images it moves the biases alone."""
    black, labels = np.zeros((400, 8, 8), np.uint8), np.arange(400) % 10
    step = ["optimizer=sgd", "optimizer.learning_rate=1e38", "training.epochs=1"]
    whole = ["training.batch_size=1000", "model.hidden_layers=0"]
    of = execute(*of_file(write_npz(tmp_path / "a.npz", black, labels)), *step, *whole)
    now = write_npz(tmp_path / "b.npz", black + np.uint8(16), labels)

    _, done, verdict = repeated(folder, of, f"data.path={now}")

    assert verdict == Verdict(word=DIFFERENT, reason=verdict.reason)
    assert verdict.reason.startswith("the training diverged in epoch 1")
    assert (done.status, done.tags["repeat.verdict"]) == ("FAILED", DIFFERENT)


# --- what cannot be repeated -------------------------------------------------------------


def test_an_unknown_run_is_refused(plain: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="no run has the id unknown"):
        find(request(folder, "unknown"))


@pytest.mark.parametrize(
    ("status", "tags", "told"),
    [
        ("KILLED", {}, "is KILLED: only a FINISHED run"),
        ("FAILED", {"error": "no room"}, r"is FAILED \(no room\): only a FINISHED run"),
        ("RUNNING", {}, "is RUNNING: only a FINISHED run"),
        ("FINISHED", {}, "has no model"),
        ("FINISHED", {"kind": "promotion"}, "is that of a promotion, which trains nothing"),
    ],
)
@pytest.mark.usefixtures("plain")
def test_a_run_without_a_model_is_refused_with_the_reason(
    configure: Configure, folder: Path, status: str, tags: dict[str, str], told: str
) -> None:
    where = f"tracking.directory={folder / 'mlruns'}"
    other = create_run(open_store(configure("data=digits", where).tracking), "other", tags)
    MlflowClient().update_run(other.run_id, status=status)

    with pytest.raises(ValueError, match=told):
        find(request(folder, other.run_id))


def test_a_model_that_was_deleted_is_missed_before_the_training(
    execute: Execute, folder: Path
) -> None:
    of = execute("seed=6")
    MlflowClient().delete_logged_model(logged_model(read_run(of)))

    with pytest.raises(ValueError, match=f"run={of} .* has no model"):
        find(request(folder, of))


def test_a_model_that_is_damaged_is_noticed_before_the_training(
    execute: Execute, folder: Path
) -> None:
    of = execute("seed=7")
    model = logged_model(read_run(of))
    (file,) = (folder / "mlruns").rglob(f"{model}/artifacts/data/model.keras")
    file.write_bytes(file.read_bytes()[:1000])

    with pytest.raises(ValueError, match=r"is not loaded: "):
        prepare(*find(request(folder, of)))

    assert list(search(f"tags.repeats = '{of}'")) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda settings: settings["model"].pop("l2"), r"model\.l2 has no value$"),
        (lambda settings: settings.pop("seed"), "seed has no value$"),
        (lambda settings: settings["model"].update(width=3), r"model\.width: Key 'width' not in"),
        (lambda settings: settings["optimizer"].update(name="lion"), r"optimizer\.name must be"),
        (
            lambda settings: settings.update(optimizer=None),
            r"optimizer is a section, of .*_epochs$",
        ),
        (lambda settings: settings.update(training=[]), r"training is a section, of .*threads"),
        (lambda settings: settings.update(augmentation=None), r"augmentation is a section, of "),
        (lambda settings: settings["data"].update(name="${oc.env:HOME}"), "interpolation"),
    ],
)
def test_settings_of_another_version_are_refused_with_the_key(
    plain: str, folder: Path, configuration: Path, change: Change, told: str
) -> None:
    rewrite(configuration, change)

    with pytest.raises(ValueError, match=f"run={plain} .* cannot be repeated: .*{told}") as refused:
        find(request(folder, plain))

    assert "\n" not in str(refused.value)


def test_a_run_of_a_version_that_had_fewer_settings_is_repeated_exactly(
    execute: Execute, folder: Path
) -> None:
    of = execute("seed=9")
    (path,) = folder.rglob(f"{of}/artifacts/config.yaml")
    rewrite(path, without_later)
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as connection:
        for name, _ in flatten(LATER):
            connection.execute("DELETE FROM params WHERE run_uuid = ? AND key = ?", (of, name))

    repetition, _, verdict = repeated(folder, of)

    assert dict(flatten(LATER)).items() <= repetition.of.params.items()
    assert set(repetition.differences) <= CODE
    assert verdict.word == EXACT


def without_later(settings: dict[str, Any]) -> None:
    for section, names in LATER.items():
        for name in names:
            del settings[section][name]
    del settings["augmentation"]


@pytest.mark.parametrize("text", ["", "{", "- 1", "\x00"])
def test_damaged_settings_are_refused(
    plain: str, folder: Path, configuration: Path, text: str
) -> None:
    configuration.write_text(text)

    with pytest.raises(ValueError, match=f"run={plain} .* cannot be repeated: .*config.yaml"):
        find(request(folder, plain))


def test_other_threads_than_the_process_has_leave_no_run(execute: Execute, folder: Path) -> None:
    of = execute("seed=8")

    with pytest.raises(ValueError, match=r"training\.threads=3: this process already runs with 1"):
        prepare(*find(request(folder, of, "training.threads=3")))

    assert list(search(f"tags.repeats = '{of}'")) == []


# --- the verdict -------------------------------------------------------------------------


THEN = Trained(
    history={"loss": {1: 0.5, 2: 0.25}, "val_accuracy": {1: 0.9, 2: 0.91}},
    weights=[np.array([[0.0, 1.0]], np.float32), np.array([2.0], np.float32)],
    correct=np.ones(1000, bool),
)


def with_weights(*arrays: npt.NDArray[np.generic]) -> Trained:
    return replace(THEN, weights=list(arrays))


def test_bit_for_bit_the_same_is_exact_without_any_validation_image() -> None:
    verdict = judge(replace(THEN, correct=None), replace(THEN, correct=None))

    assert verdict.word == EXACT
    assert "all 2 epochs" in verdict.reason
    assert verdict.details == ()


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([[0.0, np.nextafter(np.float32(1), np.float32(2))]], "weight: 1.19e-07."),
        ([[-0.0, 1.0]], "weight: 0."),
    ],
)
def test_one_bit_of_a_weight_is_not_exact(weights: list[list[float]], told: str) -> None:
    verdict = judge(THEN, with_weights(np.array(weights, np.float32), THEN.weights[1]))

    assert verdict.word == CLOSE
    assert verdict.details[0] == "The metrics of every epoch are the same."
    assert verdict.details[1].endswith(told)


def test_weights_of_other_shapes_are_told() -> None:
    verdict = judge(THEN, with_weights(np.zeros((2, 2), np.float32), THEN.weights[1]))

    assert verdict.word == CLOSE
    assert verdict.details[1] == "The weights have other shapes."


def test_one_figure_of_an_epoch_is_not_exact() -> None:
    verdict = judge(THEN, replace(THEN, history={**THEN.history, "loss": {1: 0.5, 2: 0.26}}))

    assert verdict.word == CLOSE
    assert verdict.details[0] == "First difference: loss of epoch 2: 0.25 then, 0.26 now."


@pytest.mark.parametrize(
    ("lost", "gained", "word"),
    [
        (0, 0, CLOSE),
        (1, 0, CLOSE),
        (5, 0, CLOSE),  # p = 0.0625
        (6, 0, DIFFERENT),  # p = 0.0313
        (0, 5, CLOSE),
        (0, 6, DIFFERENT),  # better is different too
        (8, 1, DIFFERENT),  # p = 0.0391
        (7, 1, CLOSE),  # p = 0.0703
        (300, 300, CLOSE),
        (300, 230, DIFFERENT),
    ],
)
def test_close_is_what_the_noise_of_the_same_images_may_be(
    lost: int, gained: int, word: str
) -> None:
    then, now = np.ones(1000, bool), np.ones(1000, bool)
    now[:lost] = False
    then[lost : lost + gained] = False

    verdict = judge(replace(THEN, history={}, correct=then), replace(THEN, correct=now))

    assert verdict.word == word
    assert f"{lost} were right only then and {gained} only now" in verdict.reason


@pytest.mark.parametrize(("then", "now"), [(None, THEN.correct), (THEN.correct, None)])
def test_without_images_in_common_what_is_not_exact_is_different(
    then: npt.NDArray[np.bool_] | None, now: npt.NDArray[np.bool_] | None
) -> None:
    verdict = judge(replace(THEN, history={}, correct=then), replace(THEN, correct=now))

    assert verdict.word == DIFFERENT


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"loss": {1: 1.0, 2: 2.0}}, ""),
        ({"loss": {1: 1.0, 2: 2.5}}, "loss of epoch 2: 2 then, 2.5 now"),
        ({"loss": {1: 1.0}}, "loss of epoch 2: 2 then, none now"),
        ({"loss": {1: 1.0, 2: 2.0, 3: 3.0}}, "loss of epoch 3: none then, 3 now"),
        ({}, "loss of epoch 1: 1 then, none now"),
        (
            {"loss": {1: 1.0, 2: 2.5}, "accuracy": {1: 0.5}},
            "accuracy of epoch 1: none then, 0.5 now",
        ),
        ({"loss": {1: 1.0000001, 2: 2.0}}, "loss of epoch 1: 1 then, 1.0000001 now"),
    ],
)
def test_the_first_metric_that_differs_is_that_of_the_first_epoch(
    now: dict[str, dict[int, float]], told: str
) -> None:
    assert first_difference({"loss": {1: 1.0, 2: 2.0}}, now) == told


def test_inputs_differ_in_the_order_of_what_they_change() -> None:
    then = {"data.sha256": "a" * 64, "training.threads": "1", "host": "here", "git.commit": "c"}
    now = {"data.sha256": "b" * 64, "training.threads": "2", "git.commit": "c"}

    assert differences({**then}, {**now}) == {
        "data.sha256": f"data.sha256: {'a' * 12} then, {'b' * 12} now",
        "training.threads": "training.threads: 1 then, 2 now",
        "host": "host: here then, not recorded now",
    }


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ("false", "false", {}),
        (None, None, {}),
        ("true", "false", {"git.dirty": "git.dirty: the code had uncommitted changes then"}),
        ("false", "true", {"git.dirty": "git.dirty: the code had uncommitted changes now"}),
        ("true", "true", {"git.dirty": "git.dirty: the code had uncommitted changes then and now"}),
    ],
)
def test_changes_that_are_not_committed_may_always_differ(
    then: str | None, now: str | None, told: dict[str, str]
) -> None:
    assert differences({"git.dirty": then}, {"git.dirty": now}) == told
