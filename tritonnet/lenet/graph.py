"""Captures launches as a CUDA graph."""

import torch


class NotCaptured(Exception):
    """Why a step has no CUDA graph."""


def capture(launch, restore, device):
    """Captures what launch() launches as one CUDA graph, and returns the function that replays it.

    launch() runs once before the capture; restore() undoes what it changed.

    Raises:
        NotCaptured: the launches run, but capturing them failed. The current stream is what it was before.
    """
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # Compiles and loads the kernels, which is not allowed during a capture.
        launch()
        restore()
    current.wait_stream(stream)
    return record(launch, stream)


def record(launch, stream, pool=None):
    """Captures what launch() launches on `stream`, without running it, and returns the function that replays it.

    Args:
        pool: of torch.cuda.graph_pool_handle(), for graphs that share their memory, captured on one stream.

    Raises:
        NotCaptured: the capture failed. The current stream is what it was before.
    """
    current, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    try:
        # Calls from other threads, such as a DataLoader pinning memory, would invalidate a global capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            launch()
    except Exception as e:
        raise NotCaptured(str(e)) from e
    finally:
        # If ending the capture fails, torch leaves the capture's stream current.
        torch.cuda.set_stream(current)
    return graph.replay
