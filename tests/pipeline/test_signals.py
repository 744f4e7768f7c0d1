"""A signal that comes during a product of wide layers spoils no memory."""

import subprocess
import sys

# Whether the main thread has a stack for signals, here and in a process that is forked.
STACK = """
import ctypes, os
import pipeline

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def is_set():
    stack = Stack()
    assert ctypes.CDLL(None, use_errno=True).sigaltstack(None, ctypes.byref(stack)) == 0
    return bool(stack.address) and stack.flags == 0 and stack.size > 0

child = os.fork()
if child == 0:
    os._exit(0 if is_set() else 3)
print(is_set(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# Of shapes that layers of 1,012, 1,024 and 2,048 units have, forth and back.
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


def test_signals_have_a_stack_of_their_own_also_in_workers() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STACK], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.stdout, ended.stderr) == ("True 0\n", "")


def test_signals_during_products_of_wide_layers_spoil_no_memory() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STORM], capture_output=True, text=True, timeout=300, check=False
    )

    assert (ended.returncode, ended.stdout) == (0, "whole\n"), ended.stderr
