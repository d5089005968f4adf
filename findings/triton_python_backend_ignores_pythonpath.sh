#!/usr/bin/env bash
# Triton's python backend does not read PYTHONPATH: a module that only that names is not found, without a word on why.
#
# The variable reaches the model's process. Its interpreter takes its paths from the `python3` that is first on PATH: the
# same module beside a virtual environment's packages is found once that environment's bin/ is there.
# Needs Debian 12's python3.11 with its shared library, which the backend's process loads (apt install libpython3.11).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
/usr/bin/python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0
packages=$work/env/lib/python3.11/site-packages
triton=$packages/pytriton/tritonserver
cp -r "$triton/backends" "$work/backends"
cp "$triton/python_backend_stubs/3.11/triton_python_backend_stub" "$work/backends/python/"
chmod +x "$work/backends/python/triton_python_backend_stub"

mkdir -p "$work/models/m/1" "$work/modules"
echo 'WHERE = __file__' > "$work/modules/mine.py"
cat > "$work/models/m/config.pbtxt" <<'CONFIG'
name: "m" backend: "python" max_batch_size: 0
input [{ name: "x" data_type: TYPE_FP32 dims: [ 1 ] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }]
CONFIG
cat > "$work/models/m/1/model.py" <<'MODEL'
import os
class TritonPythonModel:
    def initialize(self, args):
        try:
            import mine
            found = mine.WHERE
        except ModuleNotFoundError as e:
            found = str(e)
        with open(os.environ["SEEN"], "w") as file:
            print("PYTHONPATH:", os.environ.get("PYTHONPATH"), file=file)
            print("import mine:", found, file=file)
    def execute(self, requests):
        return []
MODEL

ask() {  # NAME: starts a server with the variables that are set, and shows what the model saw
  export SEEN=$work/$1
  LD_LIBRARY_PATH=$packages/nvidia_pytriton.libs "$triton/bin/tritonserver" --model-repository="$work/models" \
    --backend-directory="$work/backends" --http-address=127.0.0.1 --http-port=18431 --allow-grpc=false \
    --allow-metrics=false > "$work/log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    if [ -s "$SEEN" ] || ! kill -0 $server 2> /dev/null; then break; fi
    sleep 0.5
  done
  kill $server 2> /dev/null || true
  wait $server 2> /dev/null || true
  [ -s "$SEEN" ] || grep -m1 -i error "$work/log"
  echo "-- $1"
  sed "s#$work#WORK#g" "$SEEN"
}

cd "$work"
export PYTHONPATH=$work/modules
PATH=$work/env/bin:$PATH ask by-PYTHONPATH
unset PYTHONPATH
cp "$work/modules/mine.py" "$packages/"
PATH=$work/env/bin:$PATH ask in-the-environment-on-PATH
"$work/env/bin/pip" list 2> /dev/null | grep -i pytriton
grep -q 'PYTHONPATH: .*modules' by-PYTHONPATH
grep -q "No module named 'mine'" by-PYTHONPATH
grep -q 'import mine: .*site-packages/mine.py' in-the-environment-on-PATH
