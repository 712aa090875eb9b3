from .discovery import DiscoveryPanel as DiscoveryPanel
from .edit import EditPanel as EditPanel
from .ensemble import EnsemblePanel as EnsemblePanel
from .hallucination import HallucinationPanel as HallucinationPanel, plot_diagnosis as plot_diagnosis
from .in_context import ContextPanel as ContextPanel, ablation_plot as ablation_plot, accuracy_plot as accuracy_plot
from .nodes import NodePanel as NodePanel
from .registry import PANELS as PANELS, open_panel as open_panel
from .two_hop import HopPanel as HopPanel
