"""How does a process leave its groups, so that nothing of them runs while Python shuts down?

gloo's threads hand tensors back under the interpreter lock. A thread that waits for the lock while
Python shuts down is unwound by the interpreter, and takes the process with it: SIGABRT, "terminate
called without an active exception", after all work was done. A group ends its threads when its last
reference goes; a caught exception can hold that reference in a cycle, through its traceback.
"""

import gc

import torch.distributed as dist


def leave_process_groups() -> None:
    """End every process group of this process and their threads, once the work is done.

    Distributed contract: no collective for gloo; every rank calls it after its last exchange.
    Without a group it does nothing.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
