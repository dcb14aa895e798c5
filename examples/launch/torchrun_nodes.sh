#!/bin/sh
# torchrun on several machines. Run it on each of them, with the same arguments:
#     NODES=2 RANKS=8 HOST=node-1 examples/launch/torchrun_nodes.sh JOB [key=value …]
# HOST is one of them, which the others can reach at PORT. After a fault torchrun starts all ranks again (RESTARTS times)
# from the newest checkpoint: JOB sets checkpoint.every and checkpoint.resume=latest.
set -eu
job="${1:?the job: a YAML file that all machines have}"
shift
exec torchrun --nnodes "${NODES:?how many machines}" --nproc-per-node "${RANKS:?ranks on each}" \
    --rdzv-backend c10d --rdzv-endpoint "${HOST:?one of the machines}:${PORT:-29500}" --rdzv-id "${ID:-pentad}" \
    --max-restarts "${RESTARTS:-3}" -m pentad.trainer "$job" "$@"
