"""vLLM's CPU build in BF16, compiled as it is by default; ``--eager`` leaves that out."""

import os
import sys

from loop import answer

if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams

    # What vLLM prints on standard output is not for the driver.
    out, sys.stdout = sys.stdout, sys.stderr
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        enforce_eager="--eager" in sys.argv,
        disable_log_stats=True,
    )
    sys.stdout = out

    def run(prompts, new):
        options = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(asked, options, use_tqdm=False)
        assert all(len(result.outputs[0].token_ids) == new for result in results)

    answer(run)
