"""One run: compose a configuration, train and evaluate a Keras MLP, record it in MLflow."""

import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config import without_password

# Read by the libraries when they are first imported, so set before any of them is.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow: errors only
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # or a worker takes a whole GPU's memory
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # log only the requirements we name
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")  # a pickle runs code
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with its password
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # not 7: minutes a call
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; PostgreSQL's own: for ever

# Gives signals of this thread, which has them all, a stack of their own, and a crash of native code
# its traceback. In a product of wide layers a signal is else written over the heap, to which the
# oneDNN of TensorFlow 2.21, before its 3.11.2, has the stack's register point:
# github.com/uxlfoundation/oneDNN/issues/4845.
faulthandler.enable(2)

_make_record = logging.getLogRecordFactory()


def _without_password(*arguments: Any, **named: Any) -> logging.LogRecord:
    """What any library logs: some name the address of a server or database, whole."""
    record = _make_record(*arguments, **named)
    with suppress(Exception):  # of arguments that do not fit: logging says so itself
        record.msg, record.args = without_password(record.getMessage()), None
    if record.exc_info:
        text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = without_password(text)
    return record


logging.setLogRecordFactory(_without_password)


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Hides what native code writes, as TensorFlow and Ray do whatever their log levels."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Imports without garbage collection, which walks all there is again and again: a fifth less.

    What was imported is left out of later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def as_if_missing(library: str) -> Iterator[None]:
    """Imports Keras or Optuna as if there were no such library, half a second faster.

    Both import matplotlib's pyplot, and Keras scikit-learn, for what we do not ask them for. One
    that is imported already stays.
    """
    modules: dict[str, Any] = sys.modules
    hidden = library not in modules
    if hidden:
        modules[library] = None
    try:
        yield
    finally:
        if hidden:
            del modules[library]


def import_libraries() -> None:
    """Imports what takes seconds: TensorFlow, Keras, MLflow, and all that trains with them."""
    with stderr_closed(), fast_imports(), as_if_missing("matplotlib"):
        with as_if_missing("sklearn"):  # of Keras alone: MLflow leaves out what needs it
            import tensorflow  # noqa: F401

        import pipeline.tracking
        import pipeline.train  # noqa: F401


def start_libraries() -> None:
    """Likewise, and looks for GPUs; the libraries' messages are not shown."""
    import_libraries()
    with stderr_closed():
        import tensorflow as tf

        tf.config.list_physical_devices()  # looks for GPUs, and says so
