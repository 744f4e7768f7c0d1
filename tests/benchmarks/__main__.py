"""All benchmarks, one after the other: a table each.

MNIST_NPZ=mnist.npz python -m tests.benchmarks             # an hour; or some of them:
MNIST_NPZ=mnist.npz python -m tests.benchmarks step sweep
"""

import argparse
import subprocess
import sys

PARTS = {
    "step": ["--plot", "step.svg"],
    "overhead": [],
    "sweep": ["--rounds", "5", "--plot", "sweep.svg"],
    "growth": [],
    "store": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all unless given")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    for part in options.parts or PARTS:  # each in a process of its own, or they would share one
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{part}", *PARTS[part]], check=True)


if __name__ == "__main__":
    main()
