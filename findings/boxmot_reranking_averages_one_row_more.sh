#!/usr/bin/env bash
# boxmot's re_ranking, named after Zhong et al. (CVPR 2017), averages over k2 + 1 images where the paper's k2 counts the image itself.
#
# In the published code k2 = 1 means no query expansion. Here it averages each image's encoding with that of its nearest
# neighbor, so figures "with re-ranking (20, 6, 0.3)" of the two are not of the same method.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tqdm==4.67.1 torch==2.13.0
"$work/env/bin/pip" install --quiet --disable-pip-version-check --no-deps boxmot==25.0.0
cd "$work"
"$work/env/bin/python" - <<'PY'
from importlib.metadata import files, version
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np

path = next(f for f in files("boxmot") if str(f).endswith("reid/training/evaluator.py")).locate()
spec = spec_from_file_location("evaluator", path)  # the file alone: the package imports much else
evaluator = module_from_spec(spec)
spec.loader.exec_module(evaluator)

rng = np.random.default_rng(0)
people = rng.standard_normal((60, 64))
rows = np.repeat(people, 8, axis=0) + 1.2 * rng.standard_normal((480, 64))
rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
query, gallery = rows[::8], np.delete(rows, np.s_[::8], axis=0)
none, one = (evaluator.re_ranking(query, gallery, 20, k2, 0.3) for k2 in (0, 1))
changed = float((none.argmin(axis=1) != one.argmin(axis=1)).mean())
print("boxmot", version("boxmot"))
print(f"k2 = 1 against no expansion: distances differ by up to {np.abs(none - one).max():.3f}, first matches of {changed:.0%}")
if np.array_equal(none, one):
    raise SystemExit("changed: k2 = 1 expands nothing, as published")
PY
