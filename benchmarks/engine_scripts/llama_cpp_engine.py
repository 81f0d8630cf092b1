"""llama.cpp by its C interface (llama-cpp-python): a GGUF file, all prompts in one batch.

Version 0.3.36 crashes in its AMX kernels for 8-bit weights on some machines. Build it without them:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" \
        pip install llama-cpp-python
"""

import os
import sys

import llama_cpp as llama
import numpy as np
from loop import answer

MOST = 4096

llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
options = llama.llama_context_default_params()
options.n_ctx = options.n_batch = options.n_ubatch = MOST
options.n_seq_max = 16
options.n_threads = options.n_threads_batch = os.cpu_count()
options.kv_unified = True
context = llama.llama_init_from_model(model, options)
vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(MOST, 0, 1)


def decode(entries):
    """The likeliest token behind the last entry of each sequence; entries are (token, position, sequence, wanted)."""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    assert llama.llama_decode(context, batch) == 0
    rows = [i for i, entry in enumerate(entries) if entry[3]]
    return [
        int(np.argmax(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (vocab,))))
        for i in rows
    ]


def run(prompts, new):
    llama.llama_memory_seq_rm(llama.llama_get_memory(context), -1, -1, -1)
    entries = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    tokens, length = decode(entries), len(prompts[0])
    for step in range(new - 1):
        tokens = decode([(token, length + step, i, True) for i, token in enumerate(tokens)])


answer(run)
