"""Run by test_kit_triton.py where tritonclient is: parses configurations, asks a server, prints JSON."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def configurations(kit: str) -> None:
    """Each config.pbtxt, as Triton's own protobuf reads it."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    files = sorted(Path(kit).glob("models/*/config.pbtxt"))
    read = [text_format.Parse(file.read_text(), model_config_pb2.ModelConfig()) for file in files]
    print(json.dumps({config.name: json_format.MessageToDict(config) for config in read}))


def answers(kit: str, http: str, grpc: str, images: str, *files: str) -> None:
    """Features of `images` in requests of several sizes at once, over both protocols; and what the gallery says."""
    import tritonclient.grpc
    import tritonclient.http

    sys.path.insert(0, kit)
    import client

    pixels = np.load(images)
    parts = np.split(pixels, [1, 2, 4])
    said = {}
    for name, module, address in (("http", tritonclient.http, http), ("grpc", tritonclient.grpc, grpc)):
        server = module.InferenceServerClient(address, **({"concurrency": 4} if name == "http" else {}))

        def features(part, module=module, server=server):
            given = module.InferInput("images", part.shape, "UINT8" if part.dtype == np.uint8 else "FP32")
            given.set_data_from_numpy(part)
            return server.infer("backbone", [given]).as_numpy("features")

        with ThreadPoolExecutor(4) as pool:
            said[name] = np.concatenate(list(pool.map(features, parts))).tolist()
    server = tritonclient.http.InferenceServerClient(http)
    client.ask(server, "add", files[1:], ids=[f"person {i % 3}" for i in range(len(files) - 1)], times=0.0)
    for head in (False, True):
        said[f"head {head}"] = client.ask(server, "search", files[:1], top=4, head=head)
    try:
        client.ask(server, "erase")
    except Exception as e:
        said["refused"] = str(e)
    said["stats"] = client.ask(server, "stats")
    print(json.dumps(said))


if __name__ == "__main__":
    {"configurations": configurations, "answers": answers}[sys.argv[1]](*sys.argv[2:])
