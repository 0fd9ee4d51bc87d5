"""Facts about a model that are read off `torch.export`: which layer feeds which, what folds, where blocks end."""

from hf_r2.graph.blocks import Block, find_blocks
from hf_r2.graph.trace import Graph, example_inputs, read_graph

__all__ = ["Block", "Graph", "example_inputs", "find_blocks", "read_graph"]
