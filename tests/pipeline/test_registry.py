"""Versions, the champion and its ledger on a real registry; models that are not what they seem."""

import json
import shutil
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import keras
import mlflow
import numpy as np
import pytest
import tensorflow as tf
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.data import load
from pipeline.registry import (
    CHALLENGER,
    CHAMPION,
    DIGEST,
    Move,
    RefusedModelError,
    Version,
    delete_alias,
    example_of,
    find_version,
    load_model,
    load_served,
    logged_model,
    model_digest,
    move_champion,
    previous_champion,
    read_ledger,
    read_version,
    register,
    registered_models,
    set_alias,
    version_of,
)
from pipeline.store import Recorded, read_predictions, read_run
from tests.promotions import (
    NARROW,
    NOTHING,
    Bench,
    Payload,
    folder_of_model,
    plant_lambda,
    refusing,
    registry,
    whole,
)

RUNS = 3


@dataclass(frozen=True)
class Shelf:
    """A store with a few runs that have a model, and nothing registered."""

    bench: Bench
    runs: Sequence[Recorded]

    def register(self, run: int = 0, *, name: str = "digits", **tags: object) -> Version:
        return register(name, self.runs[run], f"# card of run {run}", tags)

    def promote(self, run: int) -> Move:
        """All that a promotion writes, in its order."""
        version = self.register(run, verdict="PROMOTE")
        set_alias(version, CHALLENGER)
        delete_alias(version.name, CHALLENGER)
        return move_champion(version, action="promote", promotion="f00d", evidence=f"run {run}")

    def files(self, run: int = 0) -> Path:
        return folder_of_model(self.bench, self.runs[run].run_id)

    def uri(self, run: int = 0) -> str:
        return f"models:/{logged_model(self.runs[run])}"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Shelf:
    """To be left as it is."""
    bench = Bench(tmp_path_factory.mktemp("registry"))
    runs = [bench.train(NARROW, "training.epochs=1", f"seed={seed}") for seed in range(RUNS)]
    return Shelf(bench, runs)


@pytest.fixture
def shelf(filled: Shelf, tmp_path: Path) -> Shelf:
    return Shelf(filled.bench.copy(tmp_path), filled.runs)


@dataclass(frozen=True)
class Saved:
    """A model that a run saved, and its files."""

    uri: str
    files: Path


@pytest.fixture(scope="module")
def spoilable(filled: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(filled.bench.copy(tmp_path_factory.mktemp("spoilable")), filled.runs)


@pytest.fixture
def saved(spoilable: Shelf, tmp_path: Path) -> Iterator[Saved]:
    """Its files may be spoilt: they are put back."""
    mlflow.set_tracking_uri(f"sqlite:///{spoilable.bench.database}")
    files = spoilable.files()
    shutil.copytree(files, tmp_path / "kept")
    yield Saved(spoilable.uri(), files)
    shutil.rmtree(files, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", files)


def champion_of(name: str = "digits") -> int | None:
    version = version_of(name)
    return version.number if version else None


# --- versions ----------------------------------------------------------------------------


def test_a_registered_run_is_the_first_version_with_its_card_and_tags(shelf: Shelf) -> None:
    version = shelf.register(0, verdict="HOLD", test_look=2)

    assert (version.number, version.run_id, version.aliases) == (1, shelf.runs[0].run_id, ())
    digest = model_digest(version.uri)
    assert version.tags == {"verdict": "HOLD", "test_look": "2", DIGEST: digest}
    assert str(version) == "digits version 1"
    assert MlflowClient().get_model_version("digits", "1").description == "# card of run 0"


def test_a_run_registered_again_is_the_same_version_with_what_is_known_now(shelf: Shelf) -> None:
    first = shelf.register(0, verdict="HOLD")
    shelf.register(1)

    again = register("digits", shelf.runs[0], "# another card", {"verdict": "PROMOTE"})

    assert again.number == first.number
    assert again.tags == {**first.tags, "verdict": "PROMOTE"}
    assert MlflowClient().get_model_version("digits", "1").description == "# another card"
    assert len(registry(shelf.bench.database)["model_versions"]) == 2


def test_a_run_registered_again_leaves_its_card_and_tags_alone_where_that_is_asked(
    shelf: Shelf,
) -> None:
    first = shelf.register(0, verdict="PROMOTE")

    again = register("digits", shelf.runs[0], "# another card", {"verdict": "HOLD"}, anew=False)

    assert again == first
    assert MlflowClient().get_model_version("digits", "1").description == "# card of run 0"


def test_a_run_without_a_model_is_not_registered(shelf: Shelf) -> None:
    failed = shelf.bench.train(NARROW, "optimizer=sgd", "optimizer.learning_rate=1e30")

    with pytest.raises(ValueError, match=f"run={failed.run_id} .* has no model"):
        register("digits", failed, "", {})

    assert failed.status == "FAILED"
    assert registry(shelf.bench.database)["model_versions"] == []


def test_a_version_tells_its_shapes_and_has_an_example(shelf: Shelf) -> None:
    version = shelf.register(0)

    info = mlflow.models.get_model_info(version.uri)

    assert [(each.type, each.shape) for each in info.signature.inputs] == [
        (np.dtype("uint8"), (-1, 8, 8))
    ]
    assert [each.shape for each in info.signature.outputs] == [(-1, 10)]
    assert example_of(version.uri).shape == (5, 8, 8)


def test_no_password_is_registered(shelf: Shelf) -> None:
    command = "python -m sweeps.promote tracking.uri=postgresql://me:hush-7f3a@host/db"

    version = register("digits", shelf.runs[0], f"- repeat: `{command}`", {"command": command})
    move_champion(version, action="promote", promotion="", evidence=command)

    assert [line for line in whole(shelf.bench.database) if "hush-7f3a" in line] == []
    assert version.tags["command"].endswith("postgresql://me:***@host/db")


def test_without_a_promotion_no_champion_is_found_and_the_command_is_told(shelf: Shelf) -> None:
    with pytest.raises(ValueError, match=r"no model is promoted here: run python -m sweeps.prom"):
        find_version(None)

    assert (registered_models(), version_of("digits"), read_ledger("digits")) == ([], None, [])


def test_the_only_model_needs_no_name_and_one_of_several_does(shelf: Shelf) -> None:
    shelf.promote(0)
    alone = find_version(None)
    set_alias(shelf.register(1, name="other"), CHAMPION)

    with pytest.raises(ValueError, match=r"name= must say which of digits, other\."):
        find_version(None)

    assert str(alone) == "digits version 1"
    assert str(find_version("other")) == "other version 1"


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        ("digit", "name=digit: no such model is promoted, only digits"),
        ("digits", "has no champion"),
    ],
)
def test_a_champion_that_is_not_there_is_told(shelf: Shelf, name: str, tells: str) -> None:
    shelf.register(0)

    with pytest.raises(ValueError, match=tells):
        find_version(name)


def test_a_version_that_is_not_there_is_told(shelf: Shelf) -> None:
    shelf.register(0)

    with pytest.raises(ValueError, match=r"name=digits has no version 7\."):
        read_version("digits", 7)


def test_an_alias_moves_and_one_that_stands_there_is_left(shelf: Shelf) -> None:
    first, second = shelf.register(0), shelf.register(1)
    set_alias(first, CHALLENGER)
    set_alias(second, CHALLENGER)
    before = whole(shelf.bench.database)

    set_alias(second, CHALLENGER)

    assert whole(shelf.bench.database) == before
    assert read_version("digits", 1).aliases == ()
    assert read_version("digits", 2).aliases == (CHALLENGER,)


def test_registering_waits_for_a_database_that_is_locked(shelf: Shelf) -> None:
    with closing(sqlite3.connect(shelf.bench.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=shelf.promote, args=(0,))
        writer.start()
        time.sleep(2)
        waited = writer.is_alive()
        other.rollback()
        writer.join(30)

    assert waited
    assert champion_of() == 1


# --- the ledger --------------------------------------------------------------------------


def test_a_promotion_is_a_line_with_all_that_is_known(shelf: Shelf) -> None:
    shelf.promote(0)

    move = shelf.promote(1)

    first, second = read_ledger("digits")
    assert (first.version, first.replaced) == (1, None)
    assert second == move
    assert (second.action, second.version, second.replaced) == ("promote", 2, 1)
    assert (second.run_id, second.promotion) == (shelf.runs[1].run_id, "f00d")
    assert (second.evidence, second.happened) == ("run 1", True)


def roll_back() -> None:
    number = previous_champion("digits")
    assert number is not None
    version = read_version("digits", number)
    move_champion(version, action="rollback", promotion="", evidence="")


def test_two_rollbacks_take_two_promotions_back_and_the_first_champion_has_none_before(
    shelf: Shelf,
) -> None:
    for run in range(RUNS):
        shelf.promote(run)

    roll_back()
    after_one = champion_of()
    roll_back()

    assert (after_one, champion_of()) == (2, 1)
    assert previous_champion("digits") is None
    moves = [(move.action, move.version, move.replaced) for move in read_ledger("digits")]
    assert moves[3:] == [("rollback", 2, 3), ("rollback", 1, 2)]


@pytest.mark.parametrize(
    "table",
    [
        "registered_models",
        "model_versions",
        "model_version_tags",
        "registered_model_aliases",
        "registered_model_tags",
        "registered_model_aliases WHEN NEW.alias = 'champion'",
    ],
)
def test_a_promotion_broken_off_at_any_step_leaves_the_champion_and_can_be_repeated(
    shelf: Shelf, table: str
) -> None:
    shelf.promote(0)

    with refusing(shelf.bench.database, table), pytest.raises(MlflowException):
        shelf.promote(1)
    after = champion_of()
    shelf.promote(1)

    assert (after, champion_of()) == (1, 2)
    assert len(registry(shelf.bench.database)["model_versions"]) == 2
    assert [(move.version, move.happened) for move in read_ledger("digits")] == [
        (1, True),
        (2, True),
    ]


def test_a_move_that_was_broken_off_is_shown_as_such_and_not_counted(shelf: Shelf) -> None:
    shelf.promote(0)
    aliases = "registered_model_aliases WHEN NEW.alias = 'champion'"

    with refusing(shelf.bench.database, aliases), pytest.raises(MlflowException):
        shelf.promote(1)
    last = [(move.version, move.happened) for move in read_ledger("digits")]
    shelf.promote(2)

    assert last == [(1, True), (2, False)]
    assert [(move.version, move.happened) for move in read_ledger("digits")] == [
        (1, True),
        (2, False),
        (3, True),
    ]
    assert previous_champion("digits") == 1


def test_lines_keep_their_order_where_the_clock_goes_back(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.promote(0)
    ahead = MlflowClient().get_registered_model("digits").tags
    ((key, line),) = ahead.items()
    MlflowClient().delete_registered_model_tag("digits", key)
    MlflowClient().set_registered_model_tag("digits", "ledger.2999-01-01T00:00:00.000000Z", line)

    shelf.promote(1)

    assert [(move.version, move.happened) for move in read_ledger("digits")] == [
        (1, True),
        (2, True),
    ]
    assert previous_champion("digits") == 1


Step = tuple[str, bool]  # what is done, and whether it is broken off before the alias
STEPS = st.tuples(st.sampled_from(["1", "2", "3", "rollback"]), st.booleans())


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEPS, max_size=8))
def test_the_ledger_agrees_with_a_plain_list_of_champions(
    several: Shelf, steps: list[Step]
) -> None:
    """Of any promotions and rollbacks, some broken off; `before` is what a rollback undoes."""
    clear(several.bench.database)
    champion: int | None = None
    before: list[int | None] = []

    for what, breaks in steps:
        target = (before[-1] if before else None) if what == "rollback" else int(what)
        if target in (None, champion):
            continue
        done = move(several, target, what, breaks=breaks)
        assert done is not breaks
        if done:
            if what == "rollback":
                before.pop()
            else:
                before.append(champion)
            champion = target

    assert champion_of() == champion
    assert previous_champion("digits") == (before[-1] if before else None)
    happened = [line.version for line in read_ledger("digits") if line.happened]
    assert happened[-1:] == ([champion] if champion else [])


@pytest.fixture(scope="module")
def several(filled: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Versions 1, 2 and 3, none of them champion."""
    shelf = Shelf(filled.bench.copy(tmp_path_factory.mktemp("several")), filled.runs)
    for run in range(RUNS):
        shelf.register(run)
    return shelf


def clear(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DELETE FROM registered_model_tags")
        connection.execute("DELETE FROM registered_model_aliases")
        connection.commit()


def move(shelf: Shelf, number: int | None, what: str, *, breaks: bool) -> bool:
    """Whether the champion was moved."""
    assert number is not None
    mlflow.set_tracking_uri(f"sqlite:///{shelf.bench.database}")
    table = "registered_model_aliases" if breaks else "registered_models"  # that is not written
    action = "rollback" if what == "rollback" else "promote"
    with refusing(shelf.bench.database, table):
        try:
            version = read_version("digits", number)
            move_champion(version, action=action, promotion="", evidence="")
        except MlflowException as error:
            assert "the disk is gone" in str(error)
            return False
    return True


# --- models ------------------------------------------------------------------------------


def test_a_model_is_loaded_by_name_and_answers_as_was_recorded(shelf: Shelf) -> None:
    shelf.promote(0)
    validation = load(shelf.bench.configure().data).validation
    recorded = read_predictions(read_run(shelf.runs[0].run_id))
    assert validation is not None
    assert recorded is not None

    loaded = load_model("models:/digits@champion").predict(validation.images, verbose=0)
    served = load_served("models:/digits/1")(validation.images)

    assert np.array_equal(loaded.argmax(axis=1), recorded.classes)
    assert np.allclose(served, loaded, atol=1e-6)


def change_description(files: Path, flavor: str = "python_function", **changes: object) -> None:
    path = files / "MLmodel"
    about = yaml.safe_load(path.read_text(encoding="utf-8"))
    about["flavors"][flavor] |= changes
    path.write_text(yaml.safe_dump(about), encoding="utf-8")


def write_pickle(path: Path, executed: Path) -> None:
    with path.open("wb") as file:
        cloudpickle.dump(Payload(executed), file)


def a_pickle_of_custom_objects(files: Path, executed: Path) -> None:
    write_pickle(files / "data" / "custom_objects.cloudpickle", executed)


def a_pickle_of_global_custom_objects(files: Path, executed: Path) -> None:
    write_pickle(files / "data" / "global_custom_objects.cloudpickle", executed)


def a_module(folder: Path, executed: Path) -> None:
    text = f"import pathlib\npathlib.Path({str(executed)!r}).touch()\n"
    folder.mkdir(exist_ok=True)
    (folder / "planted.py").write_text(text, encoding="utf-8")


def a_folder_of_code(files: Path, executed: Path) -> None:
    a_module(files / "code", executed)
    change_description(files, code="code", loader_module="planted")


def a_folder_of_code_that_is_elsewhere(files: Path, executed: Path) -> None:
    a_module(executed.parent / "elsewhere", executed)
    change_description(files, code="../" * 20 + str(executed.parent / "elsewhere"))


def another_loader(files: Path, executed: Path) -> None:
    a_module(executed.parent / "importable", executed)
    change_description(files, loader_module="planted")


def another_module_of_keras(files: Path, executed: Path) -> None:
    a_module(executed.parent / "importable", executed)
    (files / "data" / "keras_module.txt").write_text("planted", encoding="utf-8")


def data_with_a_pickle_elsewhere(files: Path, executed: Path) -> None:
    elsewhere = executed.parent / "elsewhere"
    shutil.copytree(files / "data", elsewhere)
    write_pickle(elsewhere / "custom_objects.cloudpickle", executed)
    change_description(files, data=str(elsewhere))


def data_with_a_pickle_behind_a_link(files: Path, executed: Path) -> None:
    elsewhere = executed.parent / "elsewhere"
    (files / "data").rename(elsewhere)
    write_pickle(elsewhere / "custom_objects.cloudpickle", executed)
    (files / "data").symlink_to(elsewhere)


def a_saved_model_elsewhere(files: Path, executed: Path) -> None:
    elsewhere = executed.parent / "elsewhere"

    class Writer(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8), tf.uint8)])  # type: ignore[untyped-decorator]
        def __call__(self, images: Any) -> Any:
            tf.io.write_file(str(executed), "executed")
            return tf.zeros((tf.shape(images)[0], 10))

    tf.saved_model.save(Writer(), str(elsewhere))
    module = {"model_type": "tf2-module", "saved_model_dir": str(elsewhere)}
    change_description(files, "tensorflow", **module)
    change_description(files, data=".")


DISGUISES = [
    plant_lambda,
    a_pickle_of_custom_objects,
    a_pickle_of_global_custom_objects,
    a_folder_of_code,
    a_folder_of_code_that_is_elsewhere,
    another_loader,
    another_module_of_keras,
    data_with_a_pickle_elsewhere,
    data_with_a_pickle_behind_a_link,
    a_saved_model_elsewhere,
]


@pytest.mark.parametrize("how", [load_model, load_served])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_model_with_code_in_it_is_refused_and_nothing_is_executed(
    saved: Saved,
    disguise: Callable[[Path, Path], None],
    how: Callable[[str], Callable[[Any], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executed = tmp_path / "executed"
    monkeypatch.syspath_prepend(tmp_path / "importable")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # as somebody may have it
    disguise(saved.files, executed)

    with pytest.raises(RefusedModelError) as refused:
        how(saved.uri)(np.zeros((1, 8, 8), np.uint8))

    assert not executed.exists()
    assert str(refused.value).startswith(saved.uri)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("how", [load_model, load_served])
def test_a_model_that_would_call_a_function_of_keras_is_refused(
    saved: Saved, how: Callable[[str], object]
) -> None:
    """What Keras 3.15.1 loads in safe mode, and calls `keras.config.set_floatx('float64')`."""
    images = keras.Input((8, 8))
    network = keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(images)))
    path = saved.files / "data" / "model.keras"
    network.save(path)
    with zipfile.ZipFile(path) as archive:
        files: dict[str, bytes | str] = {each: archive.read(each) for each in archive.namelist()}
    description = json.loads(files["config.json"])
    function = {"module": "keras.config", "class_name": "function", "config": "set_floatx"}
    call = {
        "module": "keras.src.ops.core",
        "class_name": "Switch",
        "name": "call",
        "config": {"name": "call"},
        "inbound_nodes": [{"args": [0, [function], "float64"], "kwargs": {}}],
    }
    description["config"]["layers"].insert(1, call)
    files["config.json"] = json.dumps(description)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)

    with pytest.raises(RefusedModelError, match=r"keras\S* is no part of a network of ours\.$"):
        how(saved.uri)

    assert keras.config.floatx() == "float32"


def test_the_lambda_layer_would_have_been_executed(saved: Saved, tmp_path: Path) -> None:
    """The test of the test: Keras executes it where it is asked to."""
    executed = tmp_path / "executed"
    plant_lambda(saved.files, executed)

    path = saved.files / "data" / "model.keras"
    keras.saving.load_model(path, safe_mode=False)(np.zeros((1, 8, 8), np.uint8))

    assert executed.exists()


@pytest.mark.parametrize("how", [load_model, load_served])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_model_that_is_cut_short_is_refused_in_one_line(
    saved: Saved, share: float, how: Callable[[str], object]
) -> None:
    path = saved.files / "data" / "model.keras"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(RefusedModelError) as refused:
        how(saved.uri)

    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "flavors: [", "flavors: {}", "[]", "\x00"])
@pytest.mark.parametrize("name", ["MLmodel", "data/keras_module.txt"])
def test_a_model_whose_description_is_damaged_is_refused_in_one_line(
    saved: Saved, name: str, content: str
) -> None:
    (saved.files / name).write_text(content, encoding="utf-8")

    with pytest.raises(RefusedModelError) as refused:
        load_served(saved.uri)

    assert len(str(refused.value).splitlines()) == 1


def test_a_model_whose_files_are_gone_is_refused_in_one_line(saved: Saved) -> None:
    shutil.rmtree(saved.files)

    with pytest.raises(RefusedModelError, match=f"{saved.uri}: its files cannot be read: "):
        load_served(saved.uri)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"inputs": [[1, 2], [3]]}'])
def test_an_example_that_is_damaged_is_refused_in_one_line(saved: Saved, content: str) -> None:
    (saved.files / "serving_input_example.json").write_text(content, encoding="utf-8")

    with pytest.raises(RefusedModelError) as refused:
        example_of(saved.uri)

    assert len(str(refused.value).splitlines()) == 1


def test_an_example_that_is_gone_is_refused(saved: Saved) -> None:
    (saved.files / "serving_input_example.json").unlink()

    with pytest.raises(RefusedModelError, match="example"):
        example_of(saved.uri)


def test_an_example_is_what_the_model_was_trained_on(saved: Saved) -> None:
    images = load(Bench(saved.files).configure().data).train.images[:5]

    example = example_of(saved.uri)

    assert example.dtype == images.dtype
    assert np.array_equal(example, images)
    text = (saved.files / "serving_input_example.json").read_text(encoding="utf-8")
    assert np.array_equal(json.loads(text)["inputs"], images)


def test_a_registry_that_is_only_read_stays_empty(saved: Saved, spoilable: Shelf) -> None:
    load_model(saved.uri)

    assert registry(spoilable.bench.database) == NOTHING
