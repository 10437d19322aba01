"""What people and tools see of a run: progress, result, report page, files, DSPy's callbacks."""
