from .ablation import Ablation as Ablation
from .interchange import load_gv as load_gv, load_mib as load_mib, save_mib as save_mib
