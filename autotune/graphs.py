"""A call recorded in a CUDA graph between two events, and replayed: what is timed is the device's work, whatever the host does meanwhile.

The events are nodes of the graph, so that its own launch is not in the time. Graphs of one `record` share their memory: what one leaves, the next may overwrite.
"""


class Recorded:
    """call: has run before, so that everything it needs is loaded. Raises what refuses to be recorded."""

    def __init__(self, call, device: int, pool):
        import torch
        self.torch, self.device, self.graph = torch, device, torch.cuda.CUDAGraph()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=pool):
            self.begin.record()
            call()
            self.end.record()

    def sample(self, flush) -> float:
        """Microseconds of one replay, after `flush` has taken the L2 cache."""
        with self.torch.cuda.device(self.device):
            if flush is not None:
                flush.zero_()
            self.graph.replay()
            self.torch.cuda.synchronize()
        return self.begin.elapsed_time(self.end) * 1e3


def record(calls: list, device: int) -> tuple[list | None, str]:
    """(each call's graph, "graph"), or (None, why they are timed by events): all or none, because the two are not compared with each other."""
    import torch
    try:
        pool = torch.cuda.graph_pool_handle()
        made = [Recorded(call, device, pool) for call in calls]
        for one in made:
            one.sample(None)
        return made, "graph"
    except Exception as error:  # noqa: BLE001 (whatever a call does that no graph may hold)
        why = f"events: {type(error).__name__}: {' '.join(str(error).split())}"[:160]
    torch.cuda.synchronize(device)  # raises if the device is lost with it
    torch.cuda.empty_cache()
    return None, why
