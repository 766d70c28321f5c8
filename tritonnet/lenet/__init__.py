"""LeNet: the module in model.py, its evaluation in two launches in weights.py, its training step in four in step.py.

recognition.py finds a LeNet in other models, and served.py checks whether it has launches of its own. The step uses
graph.py to capture a CUDA graph, optimizer.py to follow torch's optimisers, and losses.py to report losses.
"""

from .model import LeNet

__all__ = ["LeNet"]
# Files that were saved before model.py had a folder, and lists of safe globals, name the class like this.
LeNet.__module__ = __name__
