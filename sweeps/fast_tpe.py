"""Optuna's TPE with SciPy's logarithm of the normal distribution function, log Phi.

Optuna 5.0 has one in Python, called once a number: 34,000 times for a trial after 2,000, four
fifths of what asking takes. It is a private function of Optuna's, so this is all that knows of it.
"""

from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr


def use_scipy() -> None:
    """Has every TPE sampler of this process use SciPy's."""
    if hasattr(_truncnorm, "_log_ndtr"):  # else this version has another way
        _truncnorm._log_ndtr = log_ndtr
