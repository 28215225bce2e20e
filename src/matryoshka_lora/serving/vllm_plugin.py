"""The plugin of vLLM: a request whose model is ``NAME@RANK`` is answered by that rank of a nested adapter.

vLLM finds `register` by the entry point ``vllm.general_plugins``, and `matryoshka serve` names `middleware` to its
server. vLLM is imported when it calls them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from matryoshka_lora.serving.cuts import Cuts, Settings

LISTING = "/v1/ranks"
"""Where the server lists the adapters and their ranks."""

_REFUSED = re.compile(r"/((un)?load_lora_adapter|adapters(/[^/]*)?)/*$")
"""vLLM opens these with the setting that a resolver needs: they load any folder of the machine that a client names."""

_ANSWERS = re.compile(r"/(completions|responses|messages|invocations|generate|batch)/*$")
"""Where a model answers."""

# vLLM's own threads are not to wait for the disk.
_THREAD = ThreadPoolExecutor(1, "matryoshka")


@cache
def _cuts() -> Cuts | None:
    settings = Settings.read(os.environ)
    return None if settings is None else Cuts(settings)


def register() -> None:
    """Tell vLLM of the resolver; without MATRYOSHKA_VLLM_ADAPTERS, do nothing.

    Raises:
        MatryoshkaError: The environment makes no sense.
    """
    cuts = _cuts()
    if cuts is None:
        return
    find = cuts.find
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class NestedResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
        """Cuts a rank when a request names it first. An error of ours is a ValueError, which vLLM answers with 400."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            loop = asyncio.get_running_loop()
            folder = await loop.run_in_executor(_THREAD, find, lora_name, base_model_name)
            # vLLM puts a number of its own in the place of the 1.
            return None if folder is None else LoRARequest(lora_name, 1, str(folder))

    LoRAResolverRegistry.register_resolver("matryoshka", NestedResolver())


async def middleware(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """Lists the adapters with their ranks, and refuses what would be wrong or lead out of their folder."""
    path = str(request.scope["path"])
    if _REFUSED.search(path):
        return _error(403, "Adapters are named in requests, as NAME@RANK: none is loaded or unloaded here")
    if request.method == "POST" and _ANSWERS.search(path) and _is_cpu():
        model = _model(await request.body())
        if model is None or request.app.state.openai_serving_models.is_base_model(model):
            return _error(
                400,
                "on CPUs, vLLM answers for the base model by an adapter that is in the same batch: name a rank, as "
                "NAME@RANK, or start another server for the base model",
            )
    answer = await call_next(request)
    cuts = _cuts()
    # The server knows no such place: what it says of one that may not ask stays.
    if not path.endswith(LISTING) or request.method != "GET" or answer.status_code != 404 or cuts is None:
        return answer
    from starlette.responses import JSONResponse

    listed = await asyncio.get_running_loop().run_in_executor(_THREAD, cuts.listing)
    return JSONResponse({"object": "list", "data": listed})


def _error(status: int, message: str) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _model(body: bytes) -> str | None:
    """What a request names; None is the base model."""
    try:
        return str(json.loads(body)["model"] or "") or None
    except (ValueError, KeyError, TypeError):
        return None
