#!/usr/bin/env bash
# The threads of numpy's OpenBLAS keep the cores busy for 0.1 s after each product, here one of 33 MB.
#
# They wait for the next product in a loop around sched_yield, for 2^28 ticks of the processor's clock (OPENBLAS_THREAD_TIMEOUT,
# an exponent, read when numpy is imported). Other threads of the process that start meanwhile share their cores.
set -eu
[ "$(nproc)" -ge 2 ] || { echo "needs two cores"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
cat >"$work/spin.py" <<'PY'
import time

import numpy as np

x = np.ones((16000, 512), np.float32)
x @ x[0]
time.sleep(0.5)
start = time.perf_counter()
x @ x[0]
product = time.perf_counter() - start
used = time.process_time()
time.sleep(0.5)
idle = time.process_time() - used
print(f"a product took {1e3 * product:.1f} ms; the 0.5 s of sleep after it took {1e3 * idle:.0f} ms of CPU time")
raise SystemExit(idle > 0.02)
PY
cd "$work"
env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS -u OPENBLAS_THREAD_TIMEOUT env/bin/python -c "import numpy; print('numpy', numpy.__version__)"
if env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS -u OPENBLAS_THREAD_TIMEOUT env/bin/python spin.py; then echo changed; exit 1; fi
echo "with OPENBLAS_THREAD_TIMEOUT=4:"
env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS OPENBLAS_THREAD_TIMEOUT=4 env/bin/python spin.py
