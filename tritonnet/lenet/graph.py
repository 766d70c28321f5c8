"""Captures launches as a CUDA graph."""

import torch


class NotCaptured(Exception):
    """Why there is no graph of a step."""


def capture(launch, restore, device):
    """A function that replays what launch() launches, as one CUDA graph; what a first run changes is restored.

    Raises:
        NotCaptured: the launches run, but their capture failed. The current stream is the one before.
    """
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # Compiles and loads the kernels, which a capture does not allow.
        launch()
        restore()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as a DataLoader's that pins memory, may do meanwhile what would spoil a global capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch()
    except Exception as e:
        raise NotCaptured(str(e)) from e
    finally:
        # Where ending the capture fails, torch leaves its stream the current one.
        torch.cuda.set_stream(current)
    return graph.replay
