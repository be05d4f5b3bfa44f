"""Runnable examples, and the data they run on. Run them from the root of the repository."""
