"""Asks the gallery: ``client.py add ann 1.jpg 2.jpg``, ``client.py search 3.jpg``, ``client.py stats``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton

SERVER = "127.0.0.1:8000"


def ask(server, call, files=(), **arguments):
    """One request to the model `gallery`; `server` is a client of tritonclient.http."""
    request = json.dumps({"call": call, **arguments})
    texts = {"request": [request], "images": [Path(file).read_bytes() for file in files]}
    inputs = []
    for name, values in texts.items():
        if values:
            inputs.append(triton.InferInput(name, [len(values)], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array(values, object))
    return json.loads(server.infer("gallery", inputs).as_numpy("result")[0])


if __name__ == "__main__":
    call, *rest = sys.argv[1:] or sys.exit(__doc__)
    server = triton.InferenceServerClient(SERVER)
    if call == "add":
        print(json.dumps(ask(server, call, rest[1:], ids=rest[0]), indent=2))
    elif call == "search":
        found = ask(server, call, rest, top=5)
        for file, ids, scores in zip(rest, found["ids"], found["scores"], strict=True):
            print(file, *(f"{name} ({score:.4f})" for name, score in zip(ids, scores, strict=True)), sep="\n  ")
    else:
        print(json.dumps(ask(server, call), indent=2))
