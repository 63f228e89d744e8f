"""Checkpoint and restore: a session with CRIU, what is asked of it, and the hold between its answer and ours."""
