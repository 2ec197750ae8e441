#!/bin/bash
# Score models, one suite after the other, or one for each task of an array.
# sbatch --array=0-1 slurm/eval.sh toy=runs/stage3_featsharp,teacher:toy_dino fidelity=runs/upsampler_dfn_clip_3x
# Each suite appends to its own file, out/results-SUITE.jsonl (out=runs).
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=8:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file; its folder is known to the controller.
here=${RADIO_DISTILL_SLURM:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/[^ ]*.*|\1|p;T;q')}
source "$here/_launch.sh"

out=runs suites=() settings=()
for argument; do
  case $argument in
    out=*) out=${argument#out=} ;;
    --*) settings+=("$argument") ;; # --limit=N, --resolution=N, --data=FOLDER
    *) suites+=("$argument") ;;
  esac
done
[ "${#suites[@]}" -gt 0 ] || { echo "error: no suite; expected SUITE=MODEL[,MODEL...]" >&2; exit 2; }
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || suites=("${suites[$SLURM_ARRAY_TASK_ID]}")
for suite in "${suites[@]}"; do
  models=()
  IFS=, read -ra names <<<"${suite#*=}"
  for name in "${names[@]}"; do models+=(--model "$name"); done
  alone "$PYTHON" -m radio_distill eval --suite "${suite%%=*}" "${models[@]}" --out "$out/results-${suite%%=*}.jsonl" "${settings[@]}" || exit
done
