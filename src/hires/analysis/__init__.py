"""What a run left behind, as tables, tests and verdicts."""
