from .page import compare_view as compare_view
from .sessions import compare_sessions_view as compare_sessions_view
from .svg import graph_svg as graph_svg
from .widget import CircuitGraph as CircuitGraph
