"""Most bytes that a function has at once, on the CPU."""

from torch.profiler import ProfilerActivity, profile

from dist_siglip.bench.simulate import LiveBytes


def allocated_peak(run):
    """Count what is allocated, scratch memory of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def tensor_peak(run):
    """Count tensors alone: what oneDNN takes for products of bfloat16 depends on the machine."""
    with LiveBytes() as counter:
        run()
    return counter.peak
