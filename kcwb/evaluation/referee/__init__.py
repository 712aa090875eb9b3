"""Is this a circuit: every question that a referee would ask of one, answered with a test."""
