"""A parity result in words: which gates failed and by how much, which stage is to blame, and what in it is at fault."""

from __future__ import annotations

from typing import Any

from nformer_edge.core.errors import GateError
from nformer_edge.report.table import format_gates, format_table, number, percent

#: What to say where the name of the blamed stage does not say it.
CAUSES = {"end_to_end": "neither stage alone: small differences of the backbone, grown in the head"}


def describe_failures(result: dict[str, Any]) -> list[str]:
    """One line for each failed gate: stage, gate, measured, bound, by how much, and the landmark seed if it has one."""
    lines = []
    for stage in result["stages"]:
        for gate in stage["gates"]:
            if gate["kind"] == "gate" and gate["status"] == "failed":
                measured = "not a number" if gate["measured"] is None else f"{gate['measured']:.6g}"
                edge = f" (upper bound {gate['upper']:.6g})" if gate["upper"] is not None else ""
                miss = "" if gate["margin"] is None else f", missed by {abs(gate['margin']):.3g}"
                seed = "" if gate["landmark_seed"] is None else f" with landmark seed {gate['landmark_seed']}"
                lines.append(
                    f"{stage['stage'].replace('_', ' ')} {stage['precision']}, {gate['title']}: "
                    f"{measured}{edge} against {gate['bound']:g}{miss}{seed}"
                )
    return lines


def describe_causes(result: dict[str, Any]) -> list[str]:
    """What is at fault, as far as it can be told: the input, then of each compared stage the first node off."""
    lines = []
    if result["input"]["error"] != 0:
        differs = "; ".join(result["input"]["preprocess"])
        lines.append(f"the input itself differs, so it is the preprocessing: {differs}")
    return lines + [f"{found['stage']}: {line}" for found in result["layers"] for line in _layer_lines(found)]


def _layer_lines(found: dict[str, Any]) -> list[str]:
    if found["note"]:
        return [f"not compared layer by layer: {found['note']}"]
    lines = []
    if 2 * found["compared"] < found["tensors"]:
        lines.append(f"the engine's graph has {found['compared']} of the reference's {found['tensors']} tensors")
    return [*lines, describe_layers(found)]


def describe_layers(found: dict[str, Any]) -> str:
    """What the comparison of a stage's nodes came to, in a line."""
    if found["first"] is not None:
        return f"first node out of its band: {describe_node(found['first'])}"
    if found["outside"]:
        return f"{found['outside']} of {found['compared']} tensors are out of their bands, but the output agrees"
    return f"every tensor compared ({found['compared']}) is inside its band"


def describe_node(first: dict[str, Any]) -> str:
    """The first node out of its band, and what clears or accuses its inputs."""
    error = "no comparable number" if first["error"] is None else f"error {first['error']:.3g}"
    told = f"{first['node']} ({first['op']}; {error}, band {first['band']:.3g}"
    if first["own_error"] is not None:
        told += f", {first['own_error']:.3g} from the reference's own inputs"
    inputs = "its inputs are inside" if first["inputs_inside"] else "not all of its inputs could be cleared"
    return f"{told}; {inputs})"


def format_parity(result: dict[str, Any], layers: bool = False) -> str:
    """A parity result as text: its gates and the verdict, how the head came out by landmark seed, what is at fault.

    Args:
        layers: with every compared tensor as a line.
    """
    parts = [format_gates(result)]
    parts += [_by_seed(stage) for stage in result["stages"] if len(stage["runs"]) > 1]
    if result["status"] == "failed" or layers:
        parts += describe_causes(result)
    if layers:
        parts += [format_layers(found) for found in result["layers"] if found["nodes"]]
    return "\n".join(parts)


def _by_seed(stage: dict[str, Any]) -> str:
    runs = []
    for run in stage["runs"]:
        scored = run["scores"]["engine"]
        figures = f"mAP {percent(scored['mAP'], 2)}, Rank-1 {percent(scored['rank1'], 2)}" if scored else "no ranking"
        runs.append(f"{run['landmark_seed']}: {run['status']} ({figures})")
    return f"{stage['stage'].replace('_', ' ')} by landmark seed: {'; '.join(runs)}"


def format_layers(found: dict[str, Any]) -> str:
    """One line a tensor, in the order of computation."""
    body = [
        [
            n["node"],
            n["op"],
            *("-" if n[k] is None else f"{n[k]:.2e}" for k in ("error", "band")),
            number(n["sqnr_db"]) or "-",
            "-" if n["cosine"] is None else f"{n['cosine']:.6f}",
            "" if n["inside"] else "out",
        ]
        for n in found["nodes"]
    ]
    title = f"\n{found['stage']}, {found['samples']} {'images' if found['stage'] == 'backbone' else 'rows'}"
    return f"{title}\n{format_table(['node', 'op', 'error', 'band', 'SQNR dB', 'cosine', ''], body, left=2)}"


def require_passed(result: dict[str, Any]) -> None:
    """Nothing if no gate failed (undecided is not failed).

    Raises:
        GateError: naming each failed gate, by how much, the stage to blame, and what in it is at fault.
    """
    if result["status"] != "failed":
        return
    raise GateError(
        f"{result['engine']['label']} against {result['reference']['label']}: "
        + "; ".join(describe_failures(result))
        + f"; to blame: {CAUSES.get(result['blame'], result['blame'])}"
        + "".join(f"; {line}" for line in describe_causes(result)),
        hint=_mend(result),
    )


def _mend(result: dict[str, Any]) -> str:
    if result["input"]["error"] != 0:
        return "Export the bundle again from this reference: its preprocessing is another."
    blamed = [s for s in result["stages"] if s["stage"] in result["blame"]]
    if any(s["precision"] == "fp32" for s in blamed):
        return "Export and build it again from this reference."
    return "Build that stage in a finer precision, or calibrate it on more images."
