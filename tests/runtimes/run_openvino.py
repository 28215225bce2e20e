"""Generate with OpenVINO GenAI, in its own environment: ``python run_openvino.py JOB.json``.

The job has the keys ``model``, ``num_tokens``, ``output`` and ``requests``; a request has
``token_ids``, ``adapter`` (a file or null) and ``scale``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

# float32, as PEFT computes. By default a CPU that supports bfloat16 uses it.
PRECISION = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": 1,
}


def generation_config(
    adapters: genai.AdapterConfig, num_tokens: int, return_logprobs: bool
) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.eos_token_id = 2
    config.ignore_eos = True
    config.adapters = adapters
    config.max_new_tokens = num_tokens
    if return_logprobs:
        config.logprobs = 1
        config.echo = True
    return config


def create_pipeline(model: str, adapters: list[genai.Adapter]) -> genai.ContinuousBatchingPipeline:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    properties = {**PRECISION, "adapters": genai.AdapterConfig(adapters)}
    return genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)


def generate(
    pipeline: genai.ContinuousBatchingPipeline,
    token_ids: list[int],
    adapters: genai.AdapterConfig,
    num_tokens: int,
) -> dict[str, Any]:
    prompt = ov.Tensor(np.array([token_ids], dtype=np.int64))
    # `generate` changes the adapter, but returns only the sum of the log-probabilities. A request
    # returns each of them, and keeps the adapter of the last `generate`.
    pipeline.generate([prompt], [generation_config(adapters, 1, return_logprobs=False)])
    config = generation_config(adapters, num_tokens, return_logprobs=True)
    request = pipeline.add_request(0, prompt, config)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    (output,) = request.read_all()
    logprobs = [float(logprob) for logprob in output.generated_log_probs]
    return {"token_ids": list(output.generated_ids), "logprobs": logprobs[1:]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    files = {request["adapter"] for request in job["requests"] if request["adapter"]}
    adapters = {file: genai.Adapter(file) for file in files}
    pipeline = create_pipeline(job["model"], list(adapters.values()))
    answers: list[dict[str, Any]] = []
    for request in job["requests"]:
        config = genai.AdapterConfig()
        if request["adapter"]:
            config = genai.AdapterConfig(adapters[request["adapter"]], request["scale"])
        answers.append(generate(pipeline, request["token_ids"], config, job["num_tokens"]))
    Path(job["output"]).write_text(json.dumps(answers))


main()
