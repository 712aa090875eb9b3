from .confidence import confidence_curve as confidence_curve
from .faithfulness import cmd as cmd, comprehensiveness as comprehensiveness, cpr as cpr
from .frontiers import frontier as frontier
from .referee.compare import rank_circuits as rank_circuits
from .sizes import size_curve as size_curve
from .transfer import transfer_matrix as transfer_matrix
from .overlap import (
    circuit_overlap as circuit_overlap,
    relation_matrix as relation_matrix,
    shared_heads as shared_heads,
)
