from .cases import load_counterfact as load_counterfact
from .edit import default_layer as default_layer
from .scores import generate as generate, score_summary as score_summary
