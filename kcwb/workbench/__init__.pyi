from . import graph as graph, panels as panels, plots as plots, report as report, tables as tables
from .graph.widget import CircuitGraph as CircuitGraph
