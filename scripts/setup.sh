# Sourced by the scripts beside it: a virtual environment in .venv with torch, triton and this package.
#
# torch comes first and alone: whatever else asks for it later then finds it there and does not fetch another build.
# TORCH_VERSION, TRITON_VERSION, PYTHON and VENV choose others than these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}
TRITON_VERSION=${TRITON_VERSION:-3.7.1}

# Bytecode is written when a module is first imported: pip would compile all that it installs, for a minute or two.
unset PYTHONDONTWRITEBYTECODE
pip_install() { pip install --quiet --no-compile "$@"; }

# install_into_venv EXTRA: the package in editable form with one of its extras.
install_into_venv() {
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  python -c 'import torch' 2>/dev/null || pip_install "torch==$TORCH_VERSION" "triton==$TRITON_VERSION"
  pip_install -e ".[$1]"
}

# install_timm: timm and torchvision in a folder of their own, $VENV/timm, which one test puts on its path.
#
# PyPI's torchvision does not fit a CPU build of torch, and beside it in the environment it would break transformers.
install_timm() {
  TORCHVISION_VERSION=${TORCHVISION_VERSION:-0.28.0}
  [ -d "$VENV/timm/timm" ] || pip_install --no-deps --target "$VENV/timm" "timm>=1.0" "torchvision==$TORCHVISION_VERSION"
  export GLORA_KERNELS_TIMM="$PWD/$VENV/timm"
}
