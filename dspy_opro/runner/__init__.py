"""Runs a search: worker threads pull tasks from one queue, the calling thread sees what happens."""
