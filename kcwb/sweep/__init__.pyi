from .what import read_sweep as read_sweep, sweep as sweep
