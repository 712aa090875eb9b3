from .backwards import both_ways as both_ways, reversal as reversal
from .circuits import hop_circuits as hop_circuits
from .deletion import DIFFERENCE as DIFFERENCE, delete_first_hop as delete_first_hop
from .lens import hop_arrival as hop_arrival, hop_lens as hop_lens, lens_summary as lens_summary
from .overlap import hop_overlap as hop_overlap
