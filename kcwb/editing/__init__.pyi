from .cases import load_counterfact as load_counterfact
from .edit import default_layer as default_layer
from .sequence import EditSequence as EditSequence, sequential_edits as sequential_edits
from .scores import generate as generate, score_summary as score_summary
