"""The DSPy program: instructions in and out, copies, metric, evaluation, usage, differences between versions."""
