"""The page in a real browser (optional): Chromium, driven by playwright-core of npm, whose folder NODE_PATH names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.served import jpeg


@pytest.mark.optional
def test_the_page_enrolls_searches_filters_and_forgets_by_keyboard_on_desktop_and_phone(started, tmp_path):
    browser, node = shutil.which("chromium"), shutil.which("node")
    if not browser or not node:
        pytest.skip("no chromium or no node")
    if subprocess.run([node, "-e", "require('playwright-core')"], capture_output=True).returncode:
        pytest.skip("no playwright-core: npm install playwright-core, then set NODE_PATH")
    picture = tmp_path / "ann.jpg"
    picture.write_bytes(jpeg())
    command = [node, Path(__file__).with_name("page.cjs"), browser, f"http://127.0.0.1:{started[1]}", picture]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
