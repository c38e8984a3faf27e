"""A small MoE serving loop on xccl: the model in NumPy, continuous batching, speculative decoding."""
