"""The training step of any model, through autograd: call by call, and on a GPU as one CUDA graph.

operators.py is a step that waits for its loss, update.py torch's fused optimisers, replay.py the step as a graph, and
watch.py what has changed since the graph was captured.
"""

from .operators import Operators
from .replay import WholeStep

__all__ = ["Operators", "WholeStep"]
