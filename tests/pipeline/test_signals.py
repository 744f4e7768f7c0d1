"""A signal that comes during a product of wide layers spoils no memory."""

import subprocess
import sys

# Of shapes that the layers of 1,012 and 1,024 units have, forth and back.
STORM = """
import itertools, signal, time
import pipeline
pipeline.start_libraries()
import tensorflow as tf
signal.signal(signal.SIGALRM, lambda *_: None)
for m, k, n in ((256, 1024, 1024), (784, 256, 1012), (256, 2048, 2048)):
    for first, second in itertools.product((False, True), repeat=2):
        a = tf.random.normal([k, m] if first else [m, k])
        b = tf.random.normal([n, k] if second else [k, n])

        @tf.function(jit_compile=True)
        def product(a, b):
            return tf.matmul(a, b, transpose_a=first, transpose_b=second)

        expected = product(a, b).numpy()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            assert (product(a, b).numpy() == expected).all()
        signal.setitimer(signal.ITIMER_REAL, 0)
print("whole")
"""


def test_signals_during_products_of_wide_layers_spoil_no_memory() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STORM], capture_output=True, text=True, timeout=300, check=False
    )

    assert (ended.returncode, ended.stdout) == (0, "whole\n"), ended.stderr
