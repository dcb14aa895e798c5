#!/bin/sh
# The same through torchrun, on one machine: `examples/launch/torchrun.sh [JOB] [key=value …]`. RANKS is what the layout needs.
set -eu
ranks="${RANKS:-2}"
job="${1:-examples/launch/job.yaml}"
[ $# -gt 0 ] && shift
exec torchrun --standalone --nproc-per-node "$ranks" -m pentad.trainer "$job" "$@"
