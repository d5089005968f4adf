"""Which of the CPU's instruction sets matter here, by /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

#: Name in /proc/cpuinfo; x86 first, then Arm.
KNOWN = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
    "amx_bf16", "asimd", "asimdhp", "fphp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def instruction_sets() -> tuple[str, ...]:
    """Those of KNOWN that this CPU has; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(name for name in KNOWN if name in flags)


def saturates_int8() -> bool:
    """Whether u8 x s8 products may saturate here: x86 with AVX2 or AVX-512 but without VNNI."""
    found = instruction_sets()
    return "avx2" in found and not any(name in found for name in VNNI)
