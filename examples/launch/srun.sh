#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@120
# A batch script of one's own: `sbatch examples/launch/srun.sh JOB [key=value …]`. No torchrun is needed: the ranks find each
# other by the step's node list. 120 seconds before the limit they save and leave with faults.stop_code.
set -eu
job="${1:?the job: a YAML file that all nodes have}"
shift
# With faults.recover=true in the job: --kill-on-bad-exit=0, and --no-kill here and as an #SBATCH line to outlive a node.
exec srun --kill-on-bad-exit=1 python -m pentad.trainer "$job" faults.stop_code=75 "$@"
