"""Every shell and Python block of the README and of docs/ is run at toy size, or parsed where it says why it is not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.blocks import SHELL, Block, blocks, commands, parse
from PIL import Image

from nformer_edge import cli

ALL = list(blocks())
RUN = [block for block in ALL if not block.why]

#: What a command of the docs becomes at toy size: by the command's name, what is replaced and what is added.
TOY: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "train": (((r"--arch \S+ --imgsz 256 128", "--imgsz 64 32"), (r"--epochs \d+", "")),
              "--preset demo --arch osnet_x0_25 --epochs 1 --head-epochs 1"),
    "build-engine": ((), "--calib-num 16 --budget-images 16 --backend onnxruntime"),
    "benchmark": ((), "--single-stream 4 --gallery 20"),
    "embed": ((), "--batch 16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(road: Path, tmp_path_factory: pytest.TempPathFactory, request) -> Path:
    """Where a reader would stand: data sets, crops, a photo, and models by the names that the pages use."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("Market-1501-v15.09.15", "market1501", "DIR"):
        (here / name).symlink_to(road / "data")
    shutil.copytree(road / "data" / "bounding_box_test", here / "crops")
    for i, image in enumerate(sorted((road / "data" / "bounding_box_test").iterdir())[:8]):
        (here / "by-person" / f"person {7 + i // 4}").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, here / "by-person" / f"person {7 + i // 4}")
    shutil.copy(next(iter(sorted((road / "data" / "query").iterdir()))), here / "person.jpg")
    shutil.copy(road / "model.safetensors", here / "model.safetensors")
    for name, made in (("bundle", "bundle"), ("engine", "int8")):
        shutil.copytree(road / made, here / name)
    return here


def toy(words: list[str]) -> list[str]:
    """A command of the docs at toy size; flags that come twice count last."""
    replaced, added = TOY.get(words[1], ((), ""))
    line = shlex.join(words[1:])
    for pattern, new in replaced:
        line = re.sub(pattern, new, line)
    if "--features" in line:  # the model is what the store says
        added = "--preset demo --head-epochs 1"
    if words[1] in ("train", "import", "export", "build-engine", "prepare"):  # blocks share one folder
        added += " --force"
    return [*shlex.split(line), *added.split()]


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_command_of_the_docs_is_one_that_its_parser_takes(block: Block) -> None:
    if block.language in SHELL:
        for words in commands(block.text):
            parse(words)
    else:
        compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", RUN, ids=str)
def test_every_block_runs_at_toy_size_unless_it_says_why_not(block: Block, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    if block.language not in SHELL:
        images = [np.asarray(Image.open(path)) for path in sorted(Path("crops").iterdir())[:12]]
        given = {"crops": images[:8], "names": list("aabbccdd"), "queries": images[8:]}  # what the text calls by name
        given |= {
            "frame": np.concatenate(images[:3], axis=1),
            "boxes": [[0, 0, 30, 60], [32, 2, 64, 64]],
            "tracks": ["7", "9"],
        }
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__", **given})
        assert capsys.readouterr().out
        return
    for words in commands(block.text):
        assert words[0] == "nformer-edge", f"not run here, so it needs `<!-- not run: REASON -->`: {' '.join(words)}"
        code = cli.main(toy(words))
        said = capsys.readouterr()
        may_fail = words[1] == "parity" or "--max-map-drop" in words  # two epochs on eight people promise no accuracy
        assert code in (0, int(may_fail)), said.err


def test_the_check_refuses_what_does_not_exist() -> None:
    for wrong in (
        "nformer-edge evaluate --nonsense",
        "make nothing",
        "pip install 'nformer-edge[nothing]'",
        "rm -rf x",
    ):
        (words,) = commands(wrong)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            parse(words)


def test_every_json_block_is_json() -> None:
    from helpers.blocks import ROOT

    for page in sorted((ROOT / "docs").glob("*.md")):
        for body in re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.S | re.M):
            json.loads(body if body.lstrip().startswith("{") else "{" + body + "}")
