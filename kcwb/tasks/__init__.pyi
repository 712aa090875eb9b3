from .compose import compositions as compositions
from .generators import (
    addition_pairs as addition_pairs,
    docstring_pairs as docstring_pairs,
    greater_than_pairs as greater_than_pairs,
    ioi_pairs as ioi_pairs,
)
from .hops import ASKED as ASKED, HOPS as HOPS, ask_hops as ask_hops, funnel as funnel, make_hops as make_hops
from .metrics import answer_ranks as answer_ranks, hit_at_k as hit_at_k
from .mib import load_mib_task as load_mib_task
from .mquake import load_mquake as load_mquake
from .pairs import read_pairs as read_pairs
from .prompts import encode as encode
from .relations import relation_files as relation_files
from .task import ask_again as ask_again
from .shots import KINDS as KINDS, make_shots as make_shots, shot_tasks as shot_tasks
