"""A budget search as text: the frontier, and the nodes that cost most."""

from __future__ import annotations

from typing import Any

_NODES = 8


def format_budget(result: dict[str, Any]) -> list[str]:
    """JSON of kind ``budget`` as lines."""
    held, plain = result["held_out"], result["float"]
    count = result["measured"] + result["reused"]
    work = f"{count} measurements of {result['seconds']:.0f} s, {result['reused']} of them known before"
    stage = result["stage"].replace("_", " ")
    lines = [
        f"budget, {stage}: {result['budget']}; on {held['images']} images of {held['identities']} people held out",
        f"  {work}",
        "  in float    mAP  drop (95 %)  Rank-1  neighbors  ms/image  ratio     MB",
        f"       all  {100 * plain['mAP']:5.2f}               {100 * plain['rank1']:6.2f}             "
        f"{plain['latency_ms']:8.2f}         {plain['size_mb']:5.2f}",
    ]
    for i, point in enumerate(result["frontier"]):
        lines.append(
            f"  {len(point['float_nodes']):8d}  {100 * point['mAP']:5.2f}  {100 * point['map_drop']:4.2f} "
            f"({100 * point['map_drop_upper']:4.2f})  {100 * point['rank1']:6.2f}  {point['overlap_at_10']:10.3f}  "
            f"{point['latency_ms']:8.2f}  {point['latency_ratio']:5.2f}  {point['size_mb']:5.2f}"
            + ("  <- chosen" if i == result["chosen"] else "")
        )
    lines.append("  what costs most          alone: neighbors lost, drop   left out: neighbors gained")
    whole = result["frontier"][0]["overlap_at_10"]
    for row in result["nodes"][:_NODES]:
        alone, gained = row["alone"], row["left_out"]["overlap_at_10"] - whole
        more = f" and {len(row['members']) - 1} more" if len(row["members"]) > 1 else ""
        lines.append(
            f"  {1 - alone['overlap_at_10']:.3f}  {100 * alone['map_drop']:5.2f}  {gained:6.3f}  "
            f"{row['op']} {row['node']}{more}"
        )
    return lines
