"""What OpenVINO GenAI computes, in its own environment: ``python read_openvino.py JOB.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

# In float32, as PEFT computes: left alone, a CPU that has bfloat16 takes it.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


def config(adapters: genai.AdapterConfig, tokens: int, **more: Any) -> genai.GenerationConfig:
    made = genai.GenerationConfig()
    made.eos_token_id, made.ignore_eos = 2, True
    made.adapters, made.max_new_tokens = adapters, tokens
    for name, value in more.items():
        setattr(made, name, value)
    return made


job = json.loads(Path(sys.argv[1]).read_text())
files = {each["adapter"] for each in job["requests"] if each["adapter"]}
adapters = {file: genai.Adapter(file) for file in files}
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 1
loaded = {"adapters": genai.AdapterConfig(list(adapters.values()))}
pipe = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", {**EXACT, **loaded})
answers = []
for each in job["requests"]:
    own = genai.AdapterConfig()
    if each["adapter"]:
        own = genai.AdapterConfig(adapters[each["adapter"]], each["scale"])
    prompt = ov.Tensor(np.array([each["ids"]], dtype=np.int64))
    # `generate` changes the adapter and gives sums only. A request gives each token's, with the
    # adapter of the moment.
    pipe.generate([prompt], [config(own, 1)])
    request = pipe.add_request(0, prompt, config(own, job["tokens"], logprobs=1, echo=True))
    while pipe.has_non_finished_requests():
        pipe.step()
    (found,) = request.read_all()
    answers.append(
        {"ids": list(found.generated_ids), "logs": list(map(float, found.generated_log_probs))[1:]}
    )
Path(job["out"]).write_text(json.dumps(answers))
