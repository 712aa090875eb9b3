from .circuits import hop_circuits as hop_circuits, hop_overlap as hop_overlap
from .deletion import DIFFERENCE as DIFFERENCE, delete_first_hop as delete_first_hop
from .lens import (
    both_ways as both_ways,
    hop_arrival as hop_arrival,
    hop_lens as hop_lens,
    lens_summary as lens_summary,
    reversal as reversal,
)
