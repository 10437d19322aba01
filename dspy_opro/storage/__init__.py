"""Optuna's part of a run: trials to look at, a log to resume from, its pruners and its TPE sampler.

Nothing here is imported before a run needs it: Optuna takes longer to import than all the rest of this package.
"""
