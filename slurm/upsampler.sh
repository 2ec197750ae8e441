#!/bin/bash
# An upsampler of one teacher, or an array of them.
# sbatch --array=0-1 slurm/upsampler.sh recipes=upsampler/dfn_clip_3x,upsampler/siglip_3x 'data.sources.dc.path=SHARDS/{00000..99999}.tar'
#SBATCH --job-name=upsampler
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file; its folder is known to the controller.
here=${RADIO_DISTILL_SLURM:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/[^ ]*.*|\1|p;T;q')}
source "$here/_launch.sh"

recipe=upsampler/dfn_clip_3x settings=()
for argument; do
  case $argument in
    recipes=*) IFS=, read -ra recipes <<<"${argument#recipes=}"; recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]} ;;
    *) settings+=("$argument") ;;
  esac
done
launch radio_distill.train "$recipe" "${settings[@]}"
