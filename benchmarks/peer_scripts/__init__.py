"""Programs that run a peer in its own environment, all called alike:

    SCRIPT MODEL TOKENS.npy OUTPUT BATCH [OFFLOAD_DIRECTORY]

Each writes per-tensor static FP8 (weights, inputs, keys and values) of every linear layer but the head.
With a directory to offload to, the peer runs in the mode that it has for models larger than memory.
"""
