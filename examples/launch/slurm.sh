#!/bin/sh
# A script that looks at the nodes, starts again after faults and comes back into the queue is written for you, and submitted:
#     NODES=2 GPUS=8 examples/launch/slurm.sh JOB [key=value …]
set -eu
job="${1:?the job: a YAML file}"
shift
exec pentad slurm "$job" --nodes "${NODES:?how many}" --gpus-per-node "${GPUS:?on each}" --time "${TIME:-01:00:00}" \
    --submit --attach "$@"
