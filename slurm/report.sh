#!/bin/bash
# What an evaluation found: gains over a baseline, and report.html.  sbatch slurm/report.sh out=runs baseline=paper:baseline
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=0:30:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

here=${RADIO_DISTILL_SLURM:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/[^ ]*.*|\1|p;T;q')}
source "$here/_launch.sh"

out=runs baseline=paper:baseline
for argument; do
  case $argument in
    out=*) out=${argument#out=} ;;
    baseline=*) baseline=${argument#baseline=} ;;
    *) echo "error: unknown argument $argument; expected out=FOLDER baseline=MODEL" >&2; exit 2 ;;
  esac
done
cat "$out"/results-*.jsonl >"$out/results.jsonl" || exit
alone "$PYTHON" -m radio_distill gain "$out" --baseline "$baseline" || exit
alone "$PYTHON" -m radio_distill report "$out" --baseline "$baseline"
