"""Real models of real runs, as they were saved and spoilt: what a promotion finds of each."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import keras
import pytest

from pipeline.store import Recorded, read_run
from sweeps.judge import Judgement, judge
from tests.promotions import NARROW, Bench, change_weights, folder_of_model, plant_lambda

IMAGES = 575  # of the validation split
TEST_IMAGES = 360


@dataclass(frozen=True)
class Bar:
    """Runs before their judge."""

    bench: Bench
    runs: tuple[Recorded, Recorded]

    def judge(self, run: int = 0, *overrides: str) -> Judgement:
        config = self.bench.configure(NARROW, *overrides)
        return judge(config.tracking, config.data, self.runs[run].run_id, 1)

    def tags(self, run: int = 0) -> dict[str, str]:
        return dict(read_run(self.runs[run].run_id).tags)

    @property
    def files(self) -> Path:
        return folder_of_model(self.bench, self.runs[0].run_id)

    @property
    def predictions(self) -> Path:
        address = read_run(self.runs[0].run_id).artifacts
        return Path(address.removeprefix("file://")) / "predictions" / "validation.npz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Bar:
    """To be left as it is."""
    bench = Bench(tmp_path_factory.mktemp("judged"))
    return Bar(bench, (bench.train(NARROW), bench.train(NARROW, "seed=1")))


@pytest.fixture
def bar(trained: Bar, tmp_path: Path) -> Iterator[Bar]:
    yield Bar(trained.bench.copy(tmp_path), trained.runs)


def test_a_model_that_answers_as_recorded_is_looked_at_on_the_test_split(bar: Bar) -> None:
    judgement = bar.judge()

    assert (judgement.problem, judgement.images) == ("", IMAGES)
    assert len(judgement.example) == 5
    assert judgement.looked is not None
    assert (judgement.looked.images, judgement.looked.look) == (TEST_IMAGES, 1)
    recorded = read_run(bar.runs[0].run_id)
    assert recorded.metrics["test_accuracy"] == judgement.looked.accuracy
    assert recorded.metrics["test_images"] == TEST_IMAGES
    assert "test_split" in recorded.tags


def test_a_second_judgement_is_the_same_and_looks_no_second_time(bar: Bar) -> None:
    first = bar.judge(0)
    other = bar.judge(1)

    again = bar.judge(0)

    assert again == first
    assert other.looked is not None
    assert other.looked.look == 2


def test_a_look_that_was_broken_off_is_counted_once(bar: Bar) -> None:
    bar.judge(0)
    with bar.bench.edit() as database:
        database.execute("DELETE FROM latest_metrics WHERE key LIKE 'test_%'")

    again = bar.judge(0)

    assert again.looked is not None
    assert again.looked.look == 1


@pytest.mark.parametrize(
    ("scale", "shift", "problem"),
    [
        (-1.0, 0.0, r"it predicts \d+ of 575 validation images otherwise"),
        (1.0, 100.0, r"it predicts \d+ of 575 validation images otherwise"),
        (1.1, 0.0, r"its probabilities of the validation images differ from those recorded"),
    ],
)
def test_a_model_with_other_weights_is_found_and_never_sees_the_test_split(
    bar: Bar, scale: float, shift: float, problem: str
) -> None:
    change_weights(bar.files, scale, shift)

    judgement = bar.judge()

    assert judgement.looked is None
    assert re.fullmatch(problem, judgement.problem)
    assert "test_split" not in bar.tags()


def test_a_model_with_code_in_it_is_found_and_nothing_is_executed(bar: Bar, tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    plant_lambda(bar.files, executed)

    judgement = bar.judge()

    assert "is not loaded" in judgement.problem
    assert judgement.looked is None
    assert not executed.exists()
    assert "test_split" not in bar.tags()


def of_other_images(files: Path) -> None:
    layers = [keras.Input((28, 28)), keras.layers.Flatten(), keras.layers.Dense(10)]
    keras.Sequential(layers).save(files / "data" / "model.keras")


def of_other_classes(files: Path) -> None:
    layers = [keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(files / "data" / "model.keras")


def of_two_outputs(files: Path) -> None:
    images = keras.Input((8, 8))
    flat = keras.layers.Flatten()(images)
    outputs = [keras.layers.Dense(10)(flat), keras.layers.Dense(10)(flat)]
    keras.Model(images, outputs).save(files / "data" / "model.keras")


def without_an_example(files: Path) -> None:
    (files / "serving_input_example.json").unlink()


def with_an_example_of_nothing(files: Path) -> None:
    (files / "serving_input_example.json").write_text('{"inputs": []}', encoding="utf-8")


def without_files(files: Path) -> None:
    shutil.rmtree(files)


@pytest.mark.parametrize(
    "spoil",
    [
        of_other_images,
        of_other_classes,
        of_two_outputs,
        without_an_example,
        with_an_example_of_nothing,
        without_files,
    ],
)
def test_a_model_that_cannot_be_used_is_a_problem_in_one_line(
    bar: Bar, spoil: Callable[[Path], None]
) -> None:
    spoil(bar.files)

    judgement = bar.judge()

    assert judgement.problem
    assert len(judgement.problem.splitlines()) == 1
    assert judgement.looked is None
    assert "test_split" not in bar.tags()


@pytest.mark.parametrize("content", [b"", b"cut short"])
def test_a_run_whose_predictions_cannot_be_read_is_not_judged(bar: Bar, content: bytes) -> None:
    bar.predictions.write_bytes(content)

    judgement = bar.judge()

    assert judgement == Judgement(problem="its predictions are not recorded")


@pytest.mark.parametrize("override", ["data.split_seed=1", "data.validation_size=0.3"])
def test_predictions_of_other_images_are_not_compared(bar: Bar, override: str) -> None:
    judgement = bar.judge(0, override)

    assert judgement == Judgement(problem="its predictions were recorded of other images")
