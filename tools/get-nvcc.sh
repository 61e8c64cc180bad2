#!/usr/bin/env bash
# Fetches the pinned CUDA 13.0 compiler into .cuda/ from Python wheels: no root, no driver, about 300 MB unpacked.
# build.rs finds it there. Newer compilers write PTX that a driver of CUDA 13.0 refuses.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=.cuda/nvidia/cu13/bin/nvcc
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85)
# Needed by tools/check-ptx.py only. There is no version 13.0; newer versions read the output of 13.0.
readers=(nvidia-cuda-nvdisasm==13.2.51)

fail() { echo "get-nvcc.sh: $*" >&2; exit 1; }

compiles() {
  local folder
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' RETURN
  printf '%s\n' '#include <stdint.h>' 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }' \
    >"$folder/twice.cu"
  "$nvcc" -ptx -arch=compute_90a "$folder/twice.cu" -o "$folder/twice.ptx" && grep -q '\.entry twice' "$folder/twice.ptx"
}

if [ -x "$nvcc" ] && compiles 2>/dev/null; then
  echo "get-nvcc.sh: .cuda/ has a working nvcc already"
  exit 0
fi
[ "$(uname -s)" = Linux ] || fail "the wheels of this compiler are for Linux only; this is $(uname -s)"
command -v python3 >/dev/null || fail "python3 is needed to install wheels"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; install it (python3-pip) and run this again"
command -v g++ >/dev/null || fail "g++ is needed: nvcc preprocesses with it"
rm -rf .cuda
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target .cuda "${wheels[@]}" "${readers[@]}" ||
  fail "pip could not install ${wheels[*]}"
# Wheels lose the executable bit of some files.
find .cuda/nvidia -path '*/bin/*' -type f -exec chmod +x {} +
compiles || fail "the compiler was installed in .cuda/, but it does not compile a two-line kernel; its message is above"
# Makes cargo run build.rs again, which looks for the compiler.
touch build.rs
echo "get-nvcc.sh: $("$nvcc" --version | grep release)"
