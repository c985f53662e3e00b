#!/usr/bin/env bash
# GPU clusters under Slurm, from one GPU to many nodes: submits a job that runs again, from its last
# checkpoint, when it is preempted, comes to its time limit, or loses a node.
#
#   bash launch/slurm.sh OPTIONS -- JOB'S FLAGS
#   bash launch/slurm.sh --nodes=4 --gpus_per_node=8 -- --config=imagenet64 --workdir=DIR
#
#   --nodes=1 --gpus_per_node=1
#   --cpus_per_gpu=N --time=T --partition=P --account=A --qos=Q    as the cluster wants them
#   --name=cfg_jax            the job's name; its log is NAME-JOBID.out in this folder
#   --workdir=DIR             here or among the job's flags: on a disk that all nodes see, or gs://
#   --job=train               or sample, evaluate
#   --python=python           an interpreter that has cfg_jax, on every node
#   --max_reruns=20           how often it is queued again
#   --leave=120               seconds before the time limit in which to save and leave
#   --sbatch_flags="..."      more flags of sbatch
#   --dry_run                 prints the commands, which can be pasted, and runs none
set -euo pipefail

# Slurm runs a copy of this file, far from the checkout: what the job does stands alone.
# in_job MAX_RERUNS PYTHON JOB FLAGS
in_job() {
  local max_reruns=$1 python=$2 job=$3 status=0 restarts=${SLURM_RESTART_COUNT:-0} cpus=() tries
  shift 3
  # Since Slurm 22.05 a step does not take it over from its job.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  # JAX ends the other processes when one is gone; Slurm is not to kill those that are leaving.
  srun ${cpus[@]+"${cpus[@]}"} --kill-on-bad-exit=0 "$python" -m "cfg_jax.$job" "$@" || status=$?
  case $status in
    0) exit ;;
    75 | 143) ;; # told to leave by SIGTERM: saved, or, where a job has nothing to save, ended
    *)
      echo "error: the job ended with status $status, by itself: it is not queued again" >&2
      exit "$status"
      ;;
  esac
  if [ "$restarts" -ge "$max_reruns" ]; then
    echo "error: told to leave, and --max_reruns=$max_reruns are used up: submit it again" >&2
    exit 1
  fi
  echo "== told to leave: queued again ($((restarts + 1)) of $max_reruns)" >&2
  # A controller that is being restarted, or is busy, answers a little later; the job has no long to
  # live, before its time limit or once it was preempted: Slurm may end it before the last try.
  for ((tries = 1; ; tries++)); do
    ! scontrol requeue "$SLURM_JOB_ID" || break
    if [ $tries -ge 10 ]; then
      echo "error: Slurm did not queue it again, asked $tries times: submit it again, and it goes on" >&2
      exit 1
    fi
    echo "== Slurm did not queue it again: trying again ($tries of 10); submit it again if nothing" \
      "follows this line" >&2
    sleep 10
  done
  # Slurm ends this script when it takes the job back: ended before, the job would count as done.
  sleep 300
}

if [ "${1:-}" = --in_job ]; then
  shift
  in_job "$@"
  exit
fi

. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

nodes=1 gpus_per_node=1 cpus_per_gpu='' time='' partition='' account='' qos='' name=cfg_jax
python=python max_reruns=20 leave=120 sbatch_flags=''

case ${1:-} in '' | help | --help | -h) show_help "${BASH_SOURCE[0]}" && exit ;; esac
take_options "nodes gpus_per_node cpus_per_gpu time partition account qos name workdir job python \
max_reruns leave sbatch_flags" dry_run "$@"
for option in nodes gpus_per_node; do
  is_whole_number "${!option}" && [ "${!option}" -gt 0 ] ||
    mistake "--$option=${!option}: must be a whole number, at least 1"
done
for option in max_reruns leave; do
  is_whole_number "${!option}" || mistake "--$option=${!option}: must be a whole number"
done
[ -z "$cpus_per_gpu" ] || is_whole_number "$cpus_per_gpu" ||
  mistake "--cpus_per_gpu=$cpus_per_gpu: must be a whole number"
check_job ''

# One task a GPU: jax.distributed, which finds its processes in what Slurm tells each step, gives
# every process the one device of its SLURM_LOCALID. GPUs are asked for by the node, not by the task,
# so that each task sees all of its node: LOCALID counts among them, and NCCL reaches its peers.
submit=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node"
  --gpus-per-node="$gpus_per_node" --output="$name-%j.out" --open-mode=append)
[ -z "$cpus_per_gpu" ] || submit+=(--cpus-per-task="$cpus_per_gpu")
[ -z "$time" ] || submit+=(--time="$time")
[ -z "$partition" ] || submit+=(--partition="$partition")
[ -z "$account" ] || submit+=(--account="$account")
[ -z "$qos" ] || submit+=(--qos="$qos")
# A preempted job is sent SIGTERM; before its time limit it is too, by --signal. Both go to the
# steps, not to this script: they save, and leave with a status that has the job queued again.
submit+=(--requeue --signal="TERM@$leave")
read -ra more <<<"$sbatch_flags"
submit+=(${more[@]+"${more[@]}"} "${BASH_SOURCE[0]}")

command -v sbatch >/dev/null || $dry_run ||
  mistake "there is no sbatch here: run it where the cluster takes jobs, or with --dry_run"
note "now:"
call "${submit[@]}" --in_job "$max_reruns" "$python" "$job" "${flags[@]}" ||
  failed "the job was not submitted: sbatch says above why"
if $dry_run; then
  note "then, in the job:"
  quoted srun ${cpus_per_gpu:+--cpus-per-task="$cpus_per_gpu"} --kill-on-bad-exit=0 \
    "$python" -m "cfg_jax.$job" "${flags[@]}"
  echo
  note "where that was told to leave, at most $max_reruns times:"
  echo "scontrol requeue \"\$SLURM_JOB_ID\""
fi
