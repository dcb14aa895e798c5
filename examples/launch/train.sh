#!/bin/sh
# All ranks of one machine, without a launcher: `examples/launch/train.sh [JOB] [key=value …]`.
set -eu
job="${1:-examples/launch/job.yaml}"
[ $# -gt 0 ] && shift
exec pentad train "$job" "$@"
