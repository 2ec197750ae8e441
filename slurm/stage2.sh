#!/bin/bash
# Stage 2: 432 px, from runs/stage1.  sbatch slurm/stage2.sh 'data.sources.dc.path=SHARDS/{00000..99999}.tar'
#SBATCH --job-name=stage2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file; its folder is known to the controller.
here=${RADIO_DISTILL_SLURM:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/[^ ]*.*|\1|p;T;q')}
source "$here/_launch.sh"

launch radio_distill.train stage2 "$@"
