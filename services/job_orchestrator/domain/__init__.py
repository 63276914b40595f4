"""The job and the run: pure decisions, no I/O."""
