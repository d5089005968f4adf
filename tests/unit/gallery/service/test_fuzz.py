"""The API against generated requests (optional): no 5xx, no answer outside its schema."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.served import jpeg

pytestmark = pytest.mark.optional
schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis")

#: Cases of each operation that takes values: eight, so 2,080 in all.
CASES = int(os.environ.get("FUZZ_CASES", "260"))


def test_no_generated_request_meets_a_5xx_or_an_answer_outside_its_schema(started):
    bodies = st.one_of(st.sampled_from([jpeg(), jpeg((9, 200, 9)), jpeg(kind="PNG")]), st.binary(max_size=200))
    for kind in ("application/octet-stream", *(f"image/{name}" for name in ("jpeg", "png", "bmp", "webp", "tiff"))):
        schemathesis.openapi.media_type(kind, bodies)
    port, sent = started[1], 0
    statuses: dict[int, int] = {}
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    checks = [schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance,
              schemathesis.checks.status_code_conformance, schemathesis.checks.content_type_conformance]  # fmt: skip
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=CASES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def ask(case):
            nonlocal sent
            sent += 1
            answer = case.call()
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            # a deadline that a busy machine misses is the one 5xx that is meant
            if answer.status_code != 503 or "Retry-After" not in answer.headers:
                case.validate_response(answer, checks=checks)

        ask()
    print(f"{sent} cases: {dict(sorted(statuses.items()))}")
    assert {200, 201, 422} <= set(statuses)
