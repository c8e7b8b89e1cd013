#!/usr/bin/env bash
# Makes every run behind every figure and table, then the figures and tables themselves, by campaign.py in the
# environment that `make` sets up, unless another one is active. ./run_all.sh --help says how.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
if [[ -z ${VIRTUAL_ENV:-} && -x $folder/.venv/bin/python ]]; then
  python=$folder/.venv/bin/python
elif ! python=$(command -v python); then
  echo "run_all.sh: error: there is no python on the PATH: activate the environment of requirements.txt" >&2
  exit 2
fi
exec "$python" "$folder/campaign.py" "$@"
