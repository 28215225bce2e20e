"""A real ComfyUI on localhost, used through its HTTP interface."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
START_SECONDS, RUN_SECONDS = 300, 120
ENDS = ("execution_success", "execution_interrupted", "execution_error")

Graph = dict[str, dict[str, Any]]
"""A node's class and inputs by its id. An input [id, index] is the output of another node."""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Return a node of a graph."""
    return {"class_type": class_type, "inputs": inputs}


def to_graph(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """Return the graph that the page sends for a workflow that it has saved.

    Args:
        workflow: The workflow.
        object_info: The inputs of each class of nodes, which the server describes.
    """
    outputs = {link: [str(node_id), slot] for link, node_id, slot, *_ in workflow["links"]}
    graph: Graph = {}
    for item in workflow["nodes"]:
        inputs: dict[str, Any] = {}
        values = iter(item["widgets_values"])
        sections = object_info[item["type"]]["input"]
        specs = {**sections["required"], **sections.get("optional", {})}
        for name, (kind, *options) in specs.items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    next(values)
        assert not list(values), item["type"]
        for item_input in item["inputs"]:
            if item_input["link"] is not None:
                inputs[item_input["name"]] = outputs[item_input["link"]]
        graph[str(item["id"])] = node(item["type"], **inputs)
    return graph


class ComfyServer:
    """A server with our nodes, and an empty folder for its models and outputs."""

    def __init__(self, python: str, source: Path, folder: Path) -> None:
        self.loras = folder / "models/loras"
        self.models = folder / "models/diffusion_models"
        self.text_encoders = folder / "models/text_encoders"
        self.checkpoints = folder / "models/checkpoints"
        self.output = folder / "output"
        for path in (
            self.loras,
            self.models,
            self.text_encoders,
            self.checkpoints,
            self.output,
        ):
            path.mkdir(parents=True)
        (folder / "custom_nodes").mkdir()
        (folder / "custom_nodes/matryoshka-lora").symlink_to(ROOT / "comfyui")
        with socket.socket() as free_socket:
            free_socket.bind(("127.0.0.1", 0))
            port = free_socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        command = [python, str(source / "main.py"), "--cpu", "--force-fp32", "--port", str(port)]
        command += ["--listen", "127.0.0.1", "--base-directory", str(folder)]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: It does not.
        """
        for _ in range(START_SECONDS):
            if self._process.poll() is not None:
                break
            try:
                self.get("/object_info/MatryoshkaShrinkLora")
            except OSError:
                time.sleep(1)
            else:
                return
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait()

    def get(self, path: str) -> Any:
        """Return the JSON of a page."""
        with urllib.request.urlopen(self.url + path) as response:
            return json.load(response)

    def post(self, path: str, document: Any) -> bytes:
        """Send JSON, and return the answer.

        Raises:
            ValueError: The server rejects it.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                answer: bytes = response.read()
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error
        return answer

    def run(self, graph: Graph) -> dict[str, Any]:
        """Run a graph, and return its entry of the history."""
        prompt_id = json.loads(self.post("/prompt", {"prompt": graph}))["prompt_id"]
        for _ in range(RUN_SECONDS * 10):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                entry: dict[str, Any] = history[prompt_id]
                return entry
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def text_of(self, graph: Graph, node_id: str) -> str:
        """Run a graph, and return the text that a node shows."""
        entry = self.run(graph)
        assert entry["status"]["status_str"] == "success", entry["status"]
        text: str = entry["outputs"][node_id]["text"][0]
        return text

    def error_of(self, graph: Graph) -> str:
        """Run a graph that fails, and return the message that the user sees."""
        entry = self.run(graph)
        messages = dict(entry["status"]["messages"])
        assert "execution_error" in messages, entry["status"]
        message: str = messages["execution_error"]["exception_message"]
        return message

    def watch(self, graph: Graph, cancel_at: int | None = None) -> tuple[list[Any], str]:
        """Run a graph as the page does, and return what the websocket tells.

        Args:
            graph: The graph.
            cancel_at: The value of a progress bar at which Cancel is pressed.

        Returns:
            The node, value and maximum of each progress message, and the message that ended it.
        """
        return asyncio.run(self._watch(graph, cancel_at))

    async def _watch(self, graph: Graph, cancel_at: int | None) -> tuple[list[Any], str]:
        progress: list[Any] = []
        async with (
            aiohttp.ClientSession(self.url, raise_for_status=True) as session,
            session.ws_connect("/ws?clientId=test") as socket,
        ):
            await session.post("/prompt", json={"prompt": graph, "client_id": "test"})
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue  # a preview
                event = json.loads(message.data)
                if event["type"] == "progress":
                    data = event["data"]
                    progress.append((data["node"], data["value"], data["max"]))
                    if data["value"] == cancel_at:
                        await session.post("/interrupt")
                elif event["type"] in ENDS:
                    return progress, event["type"]
        raise RuntimeError(self.log.read_text()[-3000:])

    def weights_of(self, graph: Graph, model: list[Any], name: str) -> dict[str, np.ndarray]:
        """Save a model of a graph with ComfyUI's own node, and return its weights."""
        saved = {**graph, "save": node("ModelSave", model=model, filename_prefix=name)}
        entry = self.run(saved)
        assert entry["status"]["status_str"] == "success", entry["status"]
        (file,) = self.output.glob(f"{name}_*.safetensors")
        tensors = load_file(file)
        file.unlink()
        return {
            key.removeprefix("model.diffusion_model.").removeprefix("diffusion_model."): tensor
            for key, tensor in tensors.items()
        }
