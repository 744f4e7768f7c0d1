"""Predictions in process: real models in a real registry, and what is shown and written."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import registry
from pipeline.arrays import Array, find_images
from pipeline.compose import CONF, to_typed
from pipeline.config import PredictConfig, RunConfig
from pipeline.predict import (
    Predictor,
    check_writable,
    load_predictor,
    main,
    open_file,
    predict,
    split_files,
)
from pipeline.run import execute_run
from pipeline.store import read_run

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]

DIGITS = load_digits()
IMAGES, LABELS = DIGITS.images.astype(np.uint8), DIGITS.target


def configured(*overrides: str) -> PredictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("predict", list(overrides))
    return to_typed(cfg, PredictConfig, {})


@pytest.fixture(scope="module")
def store(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, with the champion `digits`."""
    folder = tmp_path_factory.mktemp("mlruns")
    promote(configure, folder, "digits", "data=digits", "training.epochs=8")
    return folder


def promote(configure: Configure, folder: Path, name: str, *overrides: str) -> str:
    """Trains a model and makes it champion; returns its run."""
    common = [f"tracking.directory={folder}", "evaluate_test=false", "tracking.figures=false"]
    result = execute_run(configure(*common, *overrides), "python -m pipeline.run")
    version = registry.register(name, read_run(result.run_id), "A card.", {})
    registry.move_champion(version, action="promote", promotion="", evidence="")
    return result.run_id


@pytest.fixture(scope="module")
def digits(store: Path) -> Predictor:
    return load_predictor(configured(f"tracking.directory={store}", "name=digits"))


@pytest.fixture
def say(store: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command shows of files."""

    def say(*files: Path, overrides: tuple[str, ...] = ()) -> str:
        config = configured(f"tracking.directory={store}", "name=digits", *overrides)
        main(config, [], files=[str(file) for file in files])
        return capsys.readouterr().out

    return say


def npz(path: Path, **arrays: Array) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def enlarged(image: Array, side: int) -> Array:
    """Dark on light, with a margin."""
    large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.pad(255 - np.asarray(large), side // 4, constant_values=255)


# --- the command line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "rest", "files"),
    [
        (["a.npz", "b.png"], [], ["a.npz", "b.png"]),
        (["a.npz", "alias=challenger"], ["alias=challenger"], ["a.npz"]),
        (["+x=1", "++y=2", "a.png"], ["+x=1", "++y=2"], ["a.png"]),
        (["a.npz", "--out", "p.csv"], ["out='p.csv'"], ["a.npz"]),
        (["--out=p.csv", "a.npz"], ["out='p.csv'"], ["a.npz"]),
        (["out=p.csv", "a.npz"], ["out='p.csv'"], ["a.npz"]),
        (["--out", "a b, (c)'s.csv"], ["out='a b, (c)\\'s.csv'"], []),
        (["a.npz", "--out"], ["out=''"], ["a.npz"]),
        (["--cfg", "job", "a.npz"], ["--cfg", "job"], ["a.npz"]),
        (["-sc", "install=bash"], ["-sc", "install=bash"], []),
        (["--help"], ["--help"], []),
        ([], [], []),
    ],
)
def test_files_are_told_from_overrides_and_flags(
    arguments: list[str], rest: list[str], files: list[str]
) -> None:
    assert split_files(arguments) == (rest, files)


def test_a_file_that_exists_is_none_of_the_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("name=seven.png").touch()

    assert split_files(["name=seven.png", "name=digits"]) == (["name=digits"], ["name=seven.png"])


@settings(deadline=None, max_examples=25)
@given(name=st.text("ab ${}:'\"\\,=[]()%~é", max_size=12))
@example(name="${oc.env:HOME}")
@example(name="it's")
def test_a_file_may_have_any_name(name: str) -> None:
    (override,), _ = split_files(["--out", f"{name}.csv"])

    assert configured(override).out == f"{name}.csv"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alias=winner", r"alias must be one of champion, challenger, got 'winner'"),
        ("batch_size=0", r"batch_size must be at least 1, got 0"),
        ("out=predictions.json", r"out must be a file that ends in \.csv or \.parquet"),
    ],
)
def test_a_setting_out_of_its_range_is_told(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(override)


def test_an_output_that_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()

    with pytest.raises(ValueError, match=r"there is no folder .*missing\.$"):
        check_writable(tmp_path / "missing" / "p.csv")
    with pytest.raises(ValueError, match=r"folder\.csv is a folder\.$"):
        check_writable(tmp_path / "folder.csv")
    with pytest.raises(ValueError, match=r"^out=/proc/p\.csv cannot be written: .*\.$"):
        check_writable(Path("/proc/p.csv"))


def test_what_cannot_be_read_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: name the files in it\.$"):
        open_file(tmp_path, None)
    with pytest.raises(ValueError, match=r"nine\.png: there is no such file\.$"):
        open_file(tmp_path / "nine.png", None)


# --- arrays ------------------------------------------------------------------------------


def test_the_model_s_own_predictions_are_given(digits: Predictor, tmp_path: Path) -> None:
    given = find_images(npz(tmp_path / "a.npz", images=IMAGES))

    predicted = predict(digits, given)

    np.testing.assert_array_equal(
        predicted.probabilities, np.asarray(digits.model(IMAGES, training=False))
    )


@pytest.mark.parametrize("batch_size", [1, 7, 1797, 5000])
def test_predictions_do_not_depend_on_the_batches(
    store: Path, digits: Predictor, tmp_path: Path, batch_size: int
) -> None:
    path = npz(tmp_path / "a.npz", images=IMAGES[:50])
    overrides = (f"tracking.directory={store}", f"batch_size={batch_size}", "name=digits")

    predicted = predict(load_predictor(configured(*overrides)), find_images(path))

    whole = predict(digits, find_images(path))
    np.testing.assert_allclose(predicted.probabilities, whole.probabilities, atol=1e-6)


def test_every_batch_is_reported(digits: Predictor, tmp_path: Path) -> None:
    given = find_images(npz(tmp_path / "a.npz", images=np.concatenate([IMAGES, IMAGES])))
    reported: list[int] = []

    predict(digits, given, reported.append)

    assert reported == [2000, 1594]


def test_an_array_is_shown_by_its_first_rows_and_a_summary(
    say: Callable[..., str], store: Path, tmp_path: Path
) -> None:
    shown = say(npz(tmp_path / "a.npz", images=IMAGES, labels=LABELS))

    first, heading, *rows = shown.splitlines()
    version = registry.find_version("digits")
    assert first == f"digits version 1 (champion), from run {version.run_id}"
    assert heading.split() == ["index", "digit", "probability", "then", "probability", "label"]
    assert rows[0].split()[:2] == ["0", "0"]
    assert rows[10] == "... 1,787 more; --out predictions.csv has them all"
    assert re.search(r"a\.npz: images: 1,797 images in \d+\.\d\d s \(.* a second\), mean", rows[11])
    counts = dict(re.findall(r"(\d): (\d+)", rows[12]))
    assert sum(map(int, counts.values())) == 1797
    assert float(rows[13].removeprefix("accuracy ")) > 0.9


def test_images_scaled_to_1_are_predicted_alike_and_that_is_said(
    say: Callable[..., str], digits: Predictor, tmp_path: Path
) -> None:
    scaled = npz(tmp_path / "a.npz", images=IMAGES / 16)

    shown = say(scaled)

    raw = predict(digits, find_images(npz(tmp_path / "b.npz", images=IMAGES)))
    alike = predict(digits, find_images(scaled))
    assert "pixels in [0, 1]: multiplied by 16, as the model was trained" in shown
    np.testing.assert_array_equal(alike.probabilities, raw.probabilities)


def test_no_accuracy_is_shown_of_test_images(say: Callable[..., str], tmp_path: Path) -> None:
    shown = say(npz(tmp_path / "a.npz", x_test=IMAGES, y_test=LABELS))

    assert "its labels are not read: looks at a test split are counted" in shown
    assert "\naccuracy" not in shown
    assert "label\n" not in shown


# --- pictures ----------------------------------------------------------------------------


def test_a_picture_is_shown_on_one_line_with_what_was_done_to_it(
    say: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "zero.png"
    Image.fromarray(enlarged(IMAGES[0] * 15, 96)).save(path)

    _, line = say(path).splitlines()

    assert re.fullmatch(
        r".*zero\.png: 0 \([01]\.\d{3}\), then \d \(0\.\d{3}\); 144x144, dark on light: inverted, "
        r"digit scaled to 8 of 8 pixels, centred by its mass",
        line,
    )


def agreement(predictor: Predictor, images: Array, pictures: list[Path]) -> float:
    """Share of pictures that are told to be the same digit as the image they were made of."""
    own = np.asarray(predictor.model(images, training=False)).argmax(axis=1)
    told = [predict(predictor, path).ranked[0, 0] for path in pictures]
    return float(np.mean(own == told))


def test_pictures_of_the_small_digits_are_told_as_the_images_are(
    digits: Predictor, tmp_path: Path
) -> None:
    pictures = []
    for number, image in enumerate(IMAGES[:150]):
        pictures.append(tmp_path / f"{number}.png")
        Image.fromarray(enlarged(image * 15, 40 + number)).save(pictures[-1])

    share = agreement(digits, IMAGES[:150], pictures)
    assert share >= 0.75  # measured: 0.84; an 8x8 image that was enlarged has no sharp edge


@pytest.fixture(scope="module")
def mnist(configure: Configure, mnist_npz: Path, store: Path) -> Predictor:
    """A small network, trained on 8,000 images of MNIST."""
    size = ("data.train_size=8000", "data.validation_size=1000", "training.epochs=3")
    promote(configure, store, "mnist", f"data.path={mnist_npz}", *size, "model.hidden_units=128")
    return load_predictor(configured(f"tracking.directory={store}", "name=mnist"))


def as_pictured(image: Array, number: int) -> Array:
    """Large or small, dark on light or not, off the middle, noisy."""
    side = 28 + 3 * (number % 60)
    large = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    off = np.pad(large, ((number % 7 * 5, 10), (10, number % 5 * 10)))
    noise = np.random.default_rng(number).normal(0, 8, off.shape)
    noisy = np.clip(20 + off * 0.8 + noise, 0, 255).astype(np.uint8)
    return 255 - noisy if number % 2 else noisy


def test_pictures_of_mnist_are_told_as_the_images_are(
    mnist: Predictor, mnist_npz: Path, tmp_path: Path
) -> None:
    with np.load(mnist_npz) as arrays:
        images = arrays["x_train"][:200]
    pictures = []
    for number, image in enumerate(images):
        pictures.append(tmp_path / f"{number}.{'png' if number % 3 else 'jpg'}")
        Image.fromarray(as_pictured(image, number)).save(pictures[-1])

    share = agreement(mnist, images, pictures)
    assert share >= 0.9  # measured: 0.965


def test_ten_thousand_images_take_less_than_two_seconds(
    mnist: Predictor, mnist_npz: Path, tmp_path: Path
) -> None:
    with np.load(mnist_npz) as arrays:
        path = npz(tmp_path / "a.npz", images=arrays["x_train"][:10_000])

    start = time.perf_counter()
    predicted = predict(mnist, find_images(path))

    assert len(predicted) == 10_000
    assert time.perf_counter() - start < 2


# --- the file ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "read"), [("p.csv", pd.read_csv), ("p.parquet", pd.read_parquet)])
def test_all_predictions_are_written(
    say: Callable[..., str],
    digits: Predictor,
    tmp_path: Path,
    name: str,
    read: Callable[[Path], pd.DataFrame],
) -> None:
    array = npz(tmp_path / "a.npz", images=IMAGES[:30], labels=LABELS[:30])
    picture = tmp_path / "zero.png"
    Image.fromarray(enlarged(IMAGES[0] * 15, 96)).save(picture)

    shown = say(array, picture, overrides=(f"out={tmp_path / name}",))

    table = read(tmp_path / name)
    classes = [f"p_{number}" for number in range(10)]
    names = ["file", "index", "prediction", "probability", *classes, "label"]
    probabilities = predict(digits, find_images(array)).probabilities
    assert list(table) == names
    assert table["file"].tolist() == [str(array)] * 30 + [str(picture)]
    assert table["index"].tolist() == [*range(30), 0]
    np.testing.assert_allclose(table[classes][:30], probabilities, rtol=1e-6)
    np.testing.assert_allclose(table["probability"], table[classes].max(axis=1), rtol=1e-6)
    assert table["prediction"].astype(int).tolist() == table[classes].to_numpy().argmax(1).tolist()
    assert table["label"][:30].astype(int).tolist() == LABELS[:30].tolist()
    assert table["label"].isna().tolist() == [False] * 30 + [True]
    assert shown.endswith(f"31 predictions in {tmp_path / name}\n")


def test_a_file_is_written_whole_or_stays_as_it_was(
    say: Callable[..., str], tmp_path: Path
) -> None:
    array = npz(tmp_path / "a.npz", images=IMAGES[:3])
    empty = tmp_path / "empty.png"
    Image.new("L", (50, 50)).save(empty)
    out = tmp_path / "p.csv"
    out.write_text("as it was")

    with pytest.raises(ValueError, match=r"empty\.png: it shows no digit"):
        say(array, empty, overrides=(f"out={out}",))

    assert out.read_text() == "as it was"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.npz", "empty.png", "p.csv"]


# --- the model ---------------------------------------------------------------------------


def test_classes_have_their_names(
    configure: Configure, store: Path, tmp_path: Path, say: Callable[..., str]
) -> None:
    names = "zero,one,two,three,four,five,six,seven,eight,nine"
    promote(
        configure, store, "named", "data=digits", "training=quick", f"data.class_names=[{names}]"
    )
    path = npz(tmp_path / "a.npz", images=IMAGES[:1], labels=LABELS[:1])

    shown = say(path, overrides=("name=named",)).splitlines()

    assert shown[2].split()[1] in names.split(",")
    assert shown[2].split()[-1] == "zero"
    assert shown[-2].startswith("zero: ")


def test_without_files_one_line_says_how(store: Path) -> None:
    with pytest.raises(ValueError, match=r"^no file is named: python -m pipeline\.predict images"):
        main(configured(), [], files=[])


def test_a_model_that_was_not_promoted_is_told(store: Path, tmp_path: Path) -> None:
    where = f"tracking.directory={store}"

    with pytest.raises(ValueError, match="digits has no challenger"):
        load_predictor(configured(where, "alias=challenger", "name=digits"))
    with pytest.raises(ValueError, match=r"no such model is promoted, only .*digits"):
        load_predictor(configured(where, "name=letters"))
    with pytest.raises(FileNotFoundError, match="no runs are recorded in"):
        load_predictor(configured(f"tracking.directory={tmp_path}"))
