# What the scripts of this folder have in common; sourced by them, not submitted.
#
#   launch MODULE RECIPE [recipe=OTHER] [key=value ...]    plan, check, then one srun task per rank; requeue when asked to stop
#   alone COMMAND ...                                      one task on the first node
#
# A site sets these before `sbatch`, or here:
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
CONTAINER=${CONTAINER:-}                # image for pyxis (--container-image); empty: none. PYTHON is then the image's own
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}  # HOST:IMAGE,...; the folder of submission is always mounted
SCRATCH=${SCRATCH:-/tmp}                # fast folder of each node, for what compilers keep
RESTARTS=${RESTARTS:-20}                # a crash is not retried in a job that was started more often than this,
RETRY_AFTER=${RETRY_AFTER:-900}         # nor when it comes within so many seconds: the same would happen again

set -uo pipefail
unset RANK LOCAL_RANK WORLD_SIZE        # of the shell that submitted; they would go before Slurm's own

# NodeAddr is how Slurm itself reaches the node; the node's name need not resolve everywhere.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # weights are fetched once, on a login node; not by every rank
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}       # the cause of a lost rank; where the network needs more (NCCL_SOCKET_IFNAME), export it
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/$(id -un)-triton}  # a shared home makes hundreds of ranks wait for its locks
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/$(id -un)-inductor}
# With GPUs the CPUs of a task belong to its loader processes.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then cpus=1; else cpus=${SLURM_CPUS_PER_TASK:-1}; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

on_node=(--kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")  # srun does not take it from the job since 22.05
if [ -n "$CONTAINER" ]; then
  on_node+=(--container-image="$CONTAINER" --container-workdir="$PWD" --container-mounts="$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi

stopping=
on_signal() { # by Slurm: the time limit is near, or the job is preempted
  stopping=yes
  [ -z "${srun_pid:-}" ] || kill -USR1 "$srun_pid" 2>/dev/null
}
trap on_signal USR1 TERM

alone() { srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${on_node[@]}" "$@"; }

on_all() { # srun in the background: a trap runs while bash waits, not while it runs a command
  # --wait: after the first rank's end; Slurm never hears of a rank whose step daemon was killed, and would wait for it
  srun --wait=600 "${on_node[@]}" "$@" &
  srun_pid=$!
  wait "$srun_pid"
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; done # a signal ends `wait` too
  wait "$srun_pid" # gives the exit code again
  local code=$?
  srun_pid=
  return "$code"
}

fact() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/.*$1=\([^ ]*\).*/\1/p;T;q"; } # of this job, as Slurm has it

requeue() {
  local state
  state=$(fact JobState)
  if [ "$state" != RUNNING ]; then # cancelled, or Slurm requeues it by itself
    echo "$(date '+%F %T') $1; job $SLURM_JOB_ID is $state"
    exit 75
  fi
  echo "$(date '+%F %T') $1; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || { echo "it was refused: submit the same line again to go on" >&2; exit 75; }
  exit 0
}

launch() {
  local module=$1 recipe=$2 argument limit settings=()
  shift 2
  for argument; do
    case $argument in recipe=*) recipe=${argument#recipe=} ;; *) settings+=("$argument") ;; esac
  done
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" != "${SLURM_NTASKS_PER_NODE:-}" ]; then
    echo "error: ${SLURM_GPUS_ON_NODE} GPUs and --ntasks-per-node=${SLURM_NTASKS_PER_NODE:-(not given)} on a node; one task drives one GPU" >&2
    exit 2
  fi
  limit=$(fact TimeLimit)
  case $limit in 00:0[0-4]:* | 00:05:00) # the signal would come before the first step, in every start again
    echo "error: a time limit of $limit; expected more than the 5 minutes before it at which Slurm asks the job to save; give --time=1:00:00 or more" >&2
    exit 2 ;;
  esac
  echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST"
  alone "$PYTHON" -m radio_distill plan "$recipe" --check --gpus "$SLURM_NTASKS" "${settings[@]}" || exit
  [ -z "$stopping" ] || requeue "asked to stop before the first step"
  # shellcheck disable=SC2086 # a module and its command are two words
  on_all "$PYTHON" -m $module "$recipe" "${settings[@]}"
  local code=$?
  case $code in
    0) echo "$(date '+%F %T') finished"; exit 0 ;;
    2) exit 2 ;; # an error that only you can mend
    75) requeue "saved and stopped as asked" ;;
  esac
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ] && [ "$SECONDS" -gt "$RETRY_AFTER" ]; then
    requeue "crashed with exit code $code after $SECONDS s"
  fi
  exit "$code"
}
