#!/usr/bin/env bash
# Ray Data: a row that kills its worker is tried again without end; the job neither fails nor gets past it.
#
# A class in map() or map_batches() runs in actors with max_restarts and max_task_retries of -1. One input that makes a
# native library crash, or that the kernel's memory limit ends, therefore stops a job of millions for good, and its log
# says "There are infinite retries remaining". max_restarts and max_task_retries as arguments of map() bound it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check "ray[data]==2.60.0" numpy==2.4.6
cd "$work"
cat > job.py <<'PY'
import logging
import os
import sys

import ray


bounds = {"max_restarts": 1, "max_task_retries": 1} if sys.argv[2] == "bounded" else {}
path = os.path.abspath(sys.argv[1])


class Dies:
    def __init__(self, path):
        self.path = path

    def __call__(self, row):
        if row["item"] == 3:
            with open(self.path, "a") as file:
                file.write("x")
            os._exit(1)
        return row


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = ray.data.from_items(list(range(8)), override_num_blocks=8)
rows.map(Dies, fn_constructor_args=(path,), concurrency=1, **bounds).take_all()
PY
export RAY_USAGE_STATS_ENABLED=0
code=0
timeout 400 "$work/env/bin/python" job.py bounded.txt bounded > bounded.log 2>&1 || code=$?
timeout --kill-after=20 100 "$work/env/bin/python" job.py default.txt default > default.log 2>&1 && end=0 || end=$?
tries=$(wc -c < default.txt)
echo "ray 2.60.0: with max_restarts=1 and max_task_retries=1 the job ended with code $code after $(wc -c < bounded.txt) tries"
echo "by default it was still trying after 100 s (code $end of timeout), $tries times so far"
test "$code" = 1 && test "$end" = 124 && test "$tries" -gt 3
