"""Uses OPRO's search from inside other tools."""
