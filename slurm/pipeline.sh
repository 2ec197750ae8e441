#!/bin/bash
# Everything as a chain of jobs; run it on a login node, do not submit it:
#
#   slurm/pipeline.sh [key=value ...] [-- OPTIONS OF EVERY sbatch]
#
#   statistics -> stage 1 -> stage 2 -> stage 3 and its control -> evaluation (an array over suites) -> gains and report.html
#   upsamplers (an array) -----------------^
#
#   slurm/pipeline.sh 'data.sources.dc.path=SHARDS/{00000..99999}.tar' -- --account=vision --partition=gpu
#   slurm/pipeline.sh stages=toy/stage1,toy/stage2,toy/stage3_featsharp upsamplers=toy/upsampler/toy_clip,toy/upsampler/toy_siglip \
#     data.sources.toy.path=scenes -- --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1
#
# key=value goes to the recipes of all trainings, but for
#   stages=A,B,C           recipes, one after the other (stage1,stage2,stage3_featsharp)
#   upsamplers=A,B         recipes of what the last stage needs (upsampler/dfn_clip_3x,upsampler/siglip_3x); empty: nothing
#   control=RECIPE         the last stage with bilinear targets (the paper's Baseline), trained beside it from the same start; empty:
#                          none (stage3 of stage3_featsharp, _featup, _tile, _s2)
#   eval=SUITE=MODEL,...   what to score; may be repeated (toy= the runs of all stages)
#   --limit=N, ...         options of the evaluation
#   baseline=MODEL         what gains are over (the control; without one the last but one stage; or paper:baseline, ...)
# Runs lie in runs/ under the folder this is called in. A job that fails takes those that wait for it out of the queue.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stages=(stage1 stage2 stage3_featsharp) upsamplers=upsampler/dfn_clip_3x,upsampler/siglip_3x
evals=() scoring=() settings=() baseline= control=of_last_stage
while [ $# -gt 0 ]; do
  case $1 in
    stages=*) IFS=, read -ra stages <<<"${1#stages=}" ;;
    upsamplers=*) upsamplers=${1#upsamplers=} ;;
    eval=*) evals+=("${1#eval=}") ;;
    baseline=*) baseline=${1#baseline=} ;;
    control=*) control=${1#control=} ;;
    --) shift; break ;;
    --*) scoring+=("$1") ;;
    *=*) settings+=("$1") ;;
    *) echo "error: $1 is no key=value; options of sbatch come after --" >&2; exit 2 ;;
  esac
  shift
done
options=("$@")
last=${stages[-1]}
if [ "$control" = of_last_stage ]; then
  case $last in *_featsharp | *_featup | *_tile | *_s2) control=${last%_*} ;; *) control= ;; esac
fi
runs=("${stages[@]//\//_}") # a shipped recipe toy/stage1 has its run in runs/toy_stage1
runs=("${runs[@]/#/runs/}")
other=${runs[-1]}
[ "${#runs[@]}" -lt 2 ] || other=${runs[-2]}
[ -z "$control" ] || { other=runs/${control//\//_} runs+=("$other"); }
[ "${#evals[@]}" -gt 0 ] || evals=("toy=$(IFS=,; echo "${runs[*]}")")
: "${baseline:=runs/results.jsonl::$other}"

queue() { # NAME AFTER SCRIPT ARGUMENTS: submits after the jobs AFTER (1:2) have finished well; prints its number
  local name=$1 after=$2 script=$here/$3 number
  shift 3
  number=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} --job-name="$name" \
    "${options[@]}" ${array:+--array=$array} "$script" "$@")
  number=${number%%;*} # NUMBER;CLUSTER where there are several clusters
  echo "$number  $name${after:+, after $after}" >&2
  echo "$number"
}

before=$(queue statistics '' statistics.sh "recipe=${stages[0]}" run=runs/statistics "${settings[@]}")
made=
if [ -n "$upsamplers" ]; then
  commas=${upsamplers//[^,]/}
  made=$(array=0-${#commas} queue upsamplers '' upsampler.sh "recipes=$upsamplers" "${settings[@]}")
fi
for i in "${!stages[@]}"; do
  more=() after=$before
  [ "$i" -gt 0 ] || more=(balance.path=runs/statistics/balancers balance.window=0)
  [ "$i" -lt $((${#stages[@]} - 1)) ] || after=$before${made:+:$made}
  [ "$i" -lt $((${#stages[@]} - 1)) ] || start=$before # of the last stage and its control
  before=$(queue "${stages[$i]//\//_}" "$after" stage1.sh "recipe=${stages[$i]}" "${settings[@]}" "${more[@]}")
done
[ -z "$control" ] || before+=:$(queue "${control//\//_}" "$start" stage1.sh "recipe=$control" "${settings[@]}")
before=$(array=0-$((${#evals[@]} - 1)) queue evaluation "$before" eval.sh "${evals[@]}" "${scoring[@]}")
queue report "$before" report.sh "baseline=$baseline" >/dev/null
