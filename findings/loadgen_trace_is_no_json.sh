#!/usr/bin/env bash
# MLPerf LoadGen's trace (enable_trace) is no JSON: names stand in doubled quotes, {"key":""loadgen_version""}.
#
# The file is called mlperf_log_trace.json and is meant for chrome://tracing. Readers that need the times of single queries
# have to read it line by line: the lines of the samples are valid.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check mlcommons-loadgen==6.0.17
cd "$work"
"$work/env/bin/python" - <<'PY'
import json
from importlib.metadata import version

import mlperf_loadgen as lg


def issue(samples):
    lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])


settings, log = lg.TestSettings(), lg.LogSettings()
settings.scenario, settings.mode = lg.TestScenario.SingleStream, lg.TestMode.PerformanceOnly
settings.min_query_count = settings.max_query_count = 64
settings.min_duration_ms = 0
log.enable_trace = True
sut, library = lg.ConstructSUT(issue, lambda: None), lg.ConstructQSL(8, 8, lambda _: None, lambda _: None)
lg.StartTestWithLogSettings(sut, library, settings, log, "")
with open("mlperf_log_trace.json") as file:
    text = file.read()
print("mlcommons-loadgen", version("mlcommons-loadgen"))
try:
    json.loads(text)
    raise SystemExit("changed: the trace is JSON")
except json.JSONDecodeError as e:
    print(f"not JSON at character {e.pos}: ...{text[e.pos - 20 : e.pos + 20]!r}...")
samples = [line for line in text.splitlines() if line.startswith('{"name":"Sample"') and "complete_ns" in line]
assert len([json.loads(line.rstrip(",")) for line in samples]) == 64, "changed"
PY
