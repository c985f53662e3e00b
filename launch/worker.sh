#!/usr/bin/env bash
# What launch/tpu.sh runs on each worker of a TPU, in the home folder, from the code it shipped:
#
#   bash cfg_jax.next/launch/worker.sh setup [--data=gs://BUCKET/DATA]
#   bash cfg_jax/launch/worker.sh start [NAME=VALUE ...] JOB [FLAG ...]
#   bash cfg_jax/launch/worker.sh state
#   bash cfg_jax/launch/worker.sh stop [the arguments of start, to stop no other job]
#
# cfg_jax/ is the code (cfg_jax.next/ until setup has put it there), cfg_jax_env/ its environment,
# tensorflow_datasets/ the data, and cfg_jax_job/ has of the job its command, its log, the process
# ids and, once it has ended, its status.
set -euo pipefail
cd ~
job=cfg_jax_job

# Is the job's shell there? Asked of /proc, because ids are given again after a reboot.
is_running() {
  [ -e $job/pid ] && [ ! -e $job/status ] &&
    grep -qa worker.sh "/proc/$(cat $job/pid)/cmdline" 2>/dev/null
}

# Python 3.11 or newer, which most TPU images do not have, in an environment of its own.
make_environment() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv --clear cfg_jax_env
      return
    fi
  done
  python3 -m pip install --quiet --disable-pip-version-check --user uv
  python3 -m uv venv --quiet --clear --seed --python 3.11 cfg_jax_env
}

setup() {
  local data=${1:-}
  if is_running; then
    echo "error: a job runs on $(hostname): stop it first" >&2
    return 1
  fi
  rm -rf cfg_jax
  mv cfg_jax.next cfg_jax
  [ -x cfg_jax_env/bin/pip ] || make_environment
  (cd cfg_jax && ../cfg_jax_env/bin/pip install --quiet --disable-pip-version-check \
    -e ".[tpu,gcs]" -c launch/constraints.txt)
  if [ -n "$data" ]; then
    # Where the data sets are looked for if nothing else is said.
    mkdir -p tensorflow_datasets
    if ! gcloud storage rsync --recursive "${data#--data=}" tensorflow_datasets >data.log 2>&1; then
      echo "error: the data did not come to $(hostname): $(grep . data.log | tail -n 1)" >&2
      return 1
    fi
  fi
  # JAX asks for it on v5e and later: the TPU starts faster.
  sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null || true
  echo "$(hostname): ready"
}

start() {
  local command
  command=$(printf '%q ' "$@")
  if is_running; then
    if [ -e $job/stopped ]; then
      echo "error: the job on $(hostname) was told to stop, and is still leaving" >&2
      return 1
    elif [ "$command" = "$(cat $job/command)" ]; then
      echo "$(hostname): runs already"
      return
    fi
    echo "error: $(hostname) runs another job: $(cat $job/command)" >&2
    return 1
  fi
  mkdir -p $job
  [ ! -e $job/log ] || mv $job/log $job/log.before
  rm -f $job/status $job/stopped $job/pid $job/child
  printf '%s\n' "$command" >$job/command
  # In a session of its own, with no terminal: it outlives the ssh that started it.
  setsid nohup bash cfg_jax/launch/worker.sh in_background "$@" </dev/null >$job/log 2>&1 &
  for _ in $(seq 100); do
    [ ! -e $job/child ] || break
    sleep 0.1
  done
  [ -e $job/child ] || { echo "error: nothing started on $(hostname)" >&2 && return 1; }
  echo "$(hostname): started"
}

in_background() {
  local child status
  echo $$ >$job/pid
  trap : TERM # this shell outlives its job, to write down how it ended
  while [[ $1 != -* && $1 == *=* ]]; do
    export "${1?}"
    shift
  done
  (cd cfg_jax && exec ../cfg_jax_env/bin/python -m "cfg_jax.$1" "${@:2}") &
  child=$!
  echo $child >$job/child
  while kill -0 $child 2>/dev/null; do wait $child || true; done
  wait $child && status=0 || status=$?
  echo $status >$job/status.partial
  mv $job/status.partial $job/status
}

# A progress bar writes over itself: each of its states is a line, less the moves of the cursor.
last_line() {
  tail -c 4000 $job/log 2>/dev/null | tr '\r' '\n' | sed $'s/\033\\[[0-9;]*[A-Za-z]//g' |
    grep -v '^ *$' | tail -n 1 | cut -c 1-300
}

# A word, for launch/tpu.sh, then where and what the log says:
#   none         nothing was started here
#   running
#   finished     it came to its end
#   stopped      by the verb stop
#   interrupted  it was told to leave, killed, rebooted away, or lost another process: start it again
#   failed N     by itself: started again it would fail again
state() {
  local word status
  if [ ! -e $job/command ]; then
    word=none
  elif is_running; then
    word=running
  else
    # Read after that question: a job that ended in between has left its status.
    status=$(cat $job/status 2>/dev/null || echo lost)
    if [ "$status" = 0 ]; then
      word=finished
    elif [ -e $job/stopped ]; then
      word=stopped
    elif [ "$status" = lost ] || [ "$status" = 75 ] || [ "$status" -ge 128 ]; then
      word="interrupted $status"
    elif grep -q '^stopped: another process is gone' $job/log; then
      word="interrupted $status"
    else
      word="failed $status"
    fi
  fi
  echo "$word on $(hostname): $(last_line)"
}

stop() {
  if is_running && [ $# -gt 0 ] && [ "$(printf '%q ' "$@")" != "$(cat $job/command)" ]; then
    echo "$(hostname): leaves the other job alone"
  elif is_running && [ $# -gt 0 ] && [ -e $job/stopped ]; then
    echo "$(hostname): was told before" # a second signal would not let it save
  elif is_running; then
    touch $job/stopped
    kill -TERM "$(cat $job/child)"
    echo "$(hostname): told to save and leave"
  else
    echo "$(hostname): no job runs"
  fi
}

case ${1:-} in
  setup | start | state | stop | in_background) "$@" ;;
  *) echo "error: '${1:-}' is not one of setup start state stop" >&2 && exit 2 ;;
esac
