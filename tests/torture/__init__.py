"""The scoreboard: broken, cut, hostile and interrupted inputs, row by row. `make torture` runs all of it.

Each case runs in a child of its own, forked from a parent that has imported everything. A violation is another result
with exit code 0, a trace, a crash, a hang, 1 GiB more than the sound run, or neither the old file nor the new one.
"""
