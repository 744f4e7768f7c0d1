"""What Optuna's TPE is given in place of a function of its own."""

import math

import numpy as np
import optuna
import pytest
from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr

from sweeps.fast_tpe import use_scipy


def ask(number: int) -> dict[str, float]:
    """The trial of this number of a study whose first ones are always the same."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3, multivariate=True))
    for _ in range(number):
        trial = study.ask()
        x, y = trial.suggest_float("x", 1e-4, 1e-2, log=True), trial.suggest_int("y", 1, 1000)
        study.tell(trial, (math.log10(x) + 3) ** 2 + y / 1000)
    return study.trials[-1].params


def test_scipy_has_the_values_of_optuna() -> None:
    numbers = np.concatenate([np.linspace(-40, 10, 2001), [-1e3, 0.0, 1e3, math.inf]])
    single = np.array([_truncnorm._log_ndtr_single(number) for number in numbers])

    assert log_ndtr(numbers) == pytest.approx(single, rel=1e-10)


def test_a_study_is_asked_the_same_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    own = np.vectorize(_truncnorm._log_ndtr_single, otypes=[float])
    monkeypatch.setattr(_truncnorm, "_log_ndtr", own)
    before = ask(30)

    use_scipy()

    assert _truncnorm._log_ndtr is log_ndtr
    assert ask(30) == pytest.approx(before, rel=1e-9)
