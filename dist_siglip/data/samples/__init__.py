"""From the bytes of a sample to the tensors of a batch."""
