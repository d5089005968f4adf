"""Which names TensorRT's Python bindings have, by version, taken from the bindings' own packages.

The bindings' wheels are small (1.3 MB) and need the TensorRT libraries only to do something. To be imported they need
a dozen functions; a stub library gives them. So no GPU, no driver and no TensorRT are needed:

    pip download --no-deps -d wheels tensorrt-cu12-bindings==10.3.0       # and the other versions; 8.6 is older:
    pip download --no-deps -d wheels tensorrt-bindings==8.6.1
    python collect.py wheels                # writes 10.3.json ... beside this file
    python collect.py --check wheels        # exit code 1 if a committed list differs from what its wheel says

It needs a C compiler, binutils and the Python that the wheels are for. `NFORMER_EDGE_TENSORRT_WHEELS=wheels make test`
runs the check among the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent

LIST = """
import json, sys
import tensorrt_bindings as trt
skip = {"tensorrt_libs", "sys", "os", "ctypes", "warnings", "attr", "value", "tensorrt"}
public = [n for n in dir(trt) if not n.startswith("_") and n not in skip]
classes = {n: sorted(a for a in dir(getattr(trt, n)) if not a.startswith("_")) for n in public
           if isinstance(getattr(trt, n), type)}
is_ours = lambda thing: isinstance(thing, type) and thing.__module__.startswith("tensor")
nested = {f"{n}.{a}": sorted(b for b in dir(getattr(getattr(trt, n), a)) if not b.startswith("_"))
          for n, names in classes.items() for a in names if is_ours(getattr(getattr(trt, n), a))}
enums = {n: list(getattr(trt, n).__members__) for n in classes if hasattr(getattr(trt, n), "__members__")}
print(json.dumps({"version": trt.__version__, "functions": sorted(set(public) - set(classes)),
                  "classes": {**classes, **nested}, "enums": enums}))
"""


def missing_functions(library: Path) -> list[str]:
    """Functions that a library takes from TensorRT: undefined, and without the version that the system's own have."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "U" and "@" not in line]
    return [
        s
        for s in symbols
        if not s.startswith("Py") and not s.startswith("_Py") and s not in ("dlopen", "dlsym", "dlclose")
    ]


def make_importable(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpacks the wheel into `folder` and puts stubs of TensorRT's libraries beside it.

    Returns:
        The environment in which Python imports ``tensorrt_bindings`` from there.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    library = next(folder.glob("tensorrt_bindings/tensorrt*.so"))
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in missing_functions(library)))
    for needed in re.findall(r"\[(libnv[\w.]+)\]", dynamic):
        command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{needed}", source, "-o", folder / needed]
        subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}


def names_of(wheel: Path) -> dict:
    """What the wheel's module has, by importing it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = make_importable(wheel, Path(folder))
        done = subprocess.run(
            [sys.executable, "-c", LIST], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{wheel.name}: {done.stderr}")
        return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with wheels of the bindings")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    differing = 0
    for wheel in sorted(args.wheels.glob("tensorrt*bindings-*.whl")):
        if wheel.name.startswith("tensorrt_rtx"):
            continue  # the package is asked itself where it is installed
        names = names_of(wheel)
        file = HERE / (".".join(names["version"].split(".")[:2]) + ".json")
        if args.check and not file.is_file():
            print(f"{wheel.name}: no {file.name} to compare it with")
        elif args.check:
            same = json.loads(file.read_text()) == names
            print(f"{wheel.name}: {'as committed' if same else 'DIFFERS from ' + file.name}")
            differing += not same
        else:
            file.write_text(json.dumps(names, indent=0, sort_keys=True) + "\n")
            print(f"{wheel.name}: {len(names['classes'])} classes -> {file.name}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
