"""Many runs: search with Optuna, compare, promote."""
