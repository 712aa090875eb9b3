from .ablation import Ablation as Ablation, AblationKind as AblationKind, register_ablation as register_ablation
from .ensemble import weighted_iou as weighted_iou
from .files import read_any as read_any
from .interchange import load_gv as load_gv, load_mib as load_mib, save_mib as save_mib
from .paths import strongest_paths as strongest_paths
from .session import Session as Session
from .submission import save_submission as save_submission
