"""What a forward keeps for its backward."""

import torch


def saved_bytes(forward, model):
    """Bytes of the memory that autograd keeps for the backward of forward(), without the model's own tensors.

    Memory that several tensors share counts once, and all of it. On the meta device nothing is allocated.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    # Kept until the end, so that no memory is freed and then found again at the same address.
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
