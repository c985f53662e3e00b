#!/usr/bin/env bash
# Google Cloud TPUs, from one chip to a pod, by queued resources:
#
#   bash launch/tpu.sh create  OPTIONS                  queues for the TPU and waits until it is there
#   bash launch/tpu.sh setup   OPTIONS                  ships this checkout to every worker, installs it
#   bash launch/tpu.sh run     OPTIONS -- JOB'S FLAGS   starts the job on every worker and watches it
#   bash launch/tpu.sh logs    OPTIONS                  follows a worker's log
#   bash launch/tpu.sh status  OPTIONS                  queued resource, node, job and its last line
#   bash launch/tpu.sh stop    OPTIONS                  tells the job to save and leave
#   bash launch/tpu.sh delete  OPTIONS                  deletes node and queued resource
#
# Of the TPU, the same for every verb (one that has no use for an option leaves it):
#   --name=NAME --zone=ZONE    which one
#   --type=v5litepod-256       what gcloud calls its accelerator type (create, run)
#   --spot                     cheap, and preempted at any time
#   --version=RUNTIME          its image, if not the one for that type
#   --project=PROJECT          if not gcloud's own
#   --data=gs://BUCKET/DATA    copied to every worker at setup, where data sets are looked for
#   --create_flags="..."       more flags of `gcloud compute tpus queued-resources create`
#   --ssh_flags="..."          more flags of `gcloud compute tpus tpu-vm ssh` and `scp`
#   --iap                      ssh and scp through Google's proxy, to workers with no address outside
#   --dry_run                  prints the commands, which can be pasted, and runs none
# Of one verb:
#   run: --workdir=gs://BUCKET/FOLDER, here or among the job's flags
#        --job=train           or sample, evaluate
#        --env=NAME=VALUE      in the job's environment; as often as needed
#        --max_reruns=20       how often it is started again, after preemptions or on the same node
#        --poll=60             seconds between looks
#        --nowatch             starts it and leaves: nothing starts it again
#   logs: --worker=0 --lines=100 --nofollow;   status: --worker=0
#
# The job outlives this script and its ssh sessions: run again, `run` finds it and watches on. After
# a preemption the TPU is made again, set up with the code that was shipped, and given the same
# command, which goes on from its workdir. With several workers gcloud wants the key of its ssh in an
# agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

name='' zone='' type='' version='' project='' data='' create_flags='' ssh_flags=''
spot=false iap=false nowatch=false nofollow=false
max_reruns=20 poll=60 worker=0 lines=100

verb=${1:-}
case $verb in
  '' | help | --help | -h) show_help "${BASH_SOURCE[0]}" && exit ;;
  create | setup | run | logs | status | stop | delete) shift ;;
  *) mistake "'$verb' is not one of create, setup, run, logs, status, stop, delete" ;;
esac
of_tpu="name zone type version project data create_flags ssh_flags"
case $verb in
  run) own="workdir job env max_reruns poll" switches=nowatch ;;
  logs) own="worker lines" switches=nofollow ;;
  status) own=worker switches= ;;
  create | setup) own=poll switches= ;;
  *) own='' switches= ;;
esac
take_options "$of_tpu${own:+ $own}" "spot iap dry_run${switches:+ $switches}" "$@"

# The image for a type, as Google's table of TPU software versions has it.
image_for() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

check_options() {
  local option
  [ -n "$name" ] || mistake "--name is missing: what is the TPU to be called, or is called?"
  case $name in
    [!a-z]* | *[!a-z0-9-]*) mistake "--name=$name: must be of a-z, 0-9 and -, and begin with a-z" ;;
  esac
  [ -n "$zone" ] || mistake "--zone is missing, as in --zone=us-west4-a"
  case $zone in
    [a-z]*-[a-z]*[0-9]-[a-z]) ;;
    *) mistake "--zone=$zone: must be a zone, as us-west4-a" ;;
  esac
  case $verb,$type in
    create, | run,) mistake "--type is missing, as in --type=v5litepod-16" ;;
    *,v5e-*) mistake "--type=$type: gcloud calls it v5litepod-${type#v5e-}" ;;
    *, | *,v[2-6]-[1-9]* | *,v5p-[1-9]* | *,v5litepod-[1-9]* | *,v6e-[1-9]*) ;;
    *) mistake "--type=$type: must be v4-N, v5p-N (N counts cores), v5litepod-N or v6e-N (chips)" ;;
  esac
  [ -n "$version" ] || version=$(image_for "$type")
  check_bucket --data "$data"
  for option in max_reruns lines; do
    is_whole_number "${!option}" || mistake "--$option=${!option}: must be a whole number"
  done
  is_whole_number "${poll/./}" || mistake "--poll=$poll: must be seconds"
  [ "$worker" = all ] || is_whole_number "$worker" ||
    mistake "--worker=$worker: must be the number of a worker, or all"
  if [ "$verb" = run ]; then
    check_job gs://
  elif [ ${#flags[@]} -gt 0 ]; then
    mistake "$verb takes no flags of a job: those are for run"
  fi
}
check_options

cd "$(dirname "${BASH_SOURCE[0]}")/.."
place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")
queued=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)
read -ra more <<<"$ssh_flags"
reach=(gcloud compute tpus tpu-vm) # for ssh and scp
if $iap; then
  reach=(gcloud alpha compute tpus tpu-vm)
  more+=(--tunnel-through-iap)
fi
package=runs/launch/$name.tar.gz
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
! $dry_run || exec 3>&1 # where it prints from inside $(...)

# This script with another verb, as the user would type it.
hint() {
  quoted bash launch/tpu.sh "$1" --name="$name" "${place[@]}"
}

# The verb create, with all that was given of what it makes.
hint_create() {
  local given=(--type="${type:-TYPE}")
  ! $spot || given+=(--spot)
  [ "$version" = "$(image_for "$type")" ] || given+=(--version="$version")
  [ -z "$create_flags" ] || given+=(--create_flags="$create_flags")
  echo "$(hint create) $(quoted "${given[@]}")"
}

# ask ANSWER COMMAND: what the cloud says, ABSENT where it knows no such thing; status 1, and why in
# $scratch/why, where it says nothing. A dry run prints the command and takes ANSWER for it.
ask() {
  local answer=$1
  shift
  if $dry_run; then
    quoted "$@" >&3
    echo >&3
    echo "$answer"
  elif ! "$@" 2>"$scratch/why"; then
    grep -q NOT_FOUND "$scratch/why" && echo ABSENT
  fi
}

# why [tried]: in one line, why the cloud did not answer, or why the last attempt failed. An error of
# the worker's or of gcloud's own comes first: details may follow it.
why() {
  local said=$scratch/${1:-why}
  { grep '^error: ' "$said" || grep '^ERROR' "$said" || grep -v '^ *$' "$said"; } 2>/dev/null |
    tail -n 1
}

# attempt COMMAND: calls it. Once something runs, what it says on standard error is kept, for `why
# tried`; until then gcloud has the terminal to itself, where it may have questions.
attempt() {
  if $dry_run || [ $patience = 1 ]; then
    call "$@"
  else
    { call "$@" 2>&1 >&4 | tee "$scratch/said" >&2; } 4>&1 && return
    grep -v '^\$ ' "$scratch/said" >"$scratch/tried" || true # less the command
    return 1
  fi
}

# Was it the user's mistake, that no patience mends? A quota is none, whatever it is filed under.
is_mistaken() {
  why tried | grep -v -i quota | grep -q -E \
    '^ERROR: \(gcloud.*(unrecognized arg|argument -|Invalid choice|INVALID_ARG|PERMISSION_DENIED)'
}

ssh_to() {
  local workers=$1 command=$2
  where=("${reach[@]}" ssh "$name" "${place[@]}" --worker="$workers" ${more[@]+"${more[@]}"}
    --command="$command")
}

# look: what the cloud has. $phase is one of
#   absent   no such queued resource
#   waiting  in the queue, being made, repaired, suspended or deleted: look again
#   ready    the workers can be reached
#   lost     preempted, suspended or failed: it will not come back by itself
#   still    stopped by hand
# and $seen says it in the cloud's words. Status 1 where it does not answer.
look() {
  local state
  state=$(ask ACTIVE "${queued[@]}" describe "$name" "${place[@]}" '--format=value(state.state)') ||
    return 1
  seen=$state
  case $state in
    ABSENT) phase=absent ;;
    SUSPENDED | FAILED) phase=lost ;;
    ACTIVE)
      state=$(ask READY "${node[@]}" describe "$name" "${place[@]}" '--format=value(state)') ||
        return 1
      seen="$state"
      case $state in
        READY) phase=ready ;;
        PREEMPTED | TERMINATED | ABSENT) phase=lost ;;
        STOPPED | HIDDEN) phase=still ;;
        *) phase=waiting ;;
      esac
      ;;
    *) phase=waiting ;;
  esac
}

# Once something runs, a cloud that fails for a while is no reason to leave it: how often each thing
# is tried, --poll apart, before that ends the watch.
patience=1
look_patiently() {
  local tries
  for ((tries = 1; ; tries++)); do
    ! look || break
    [ $tries -lt $patience ] || failed "the cloud does not say how $name is: $(why)"
    nap
  done
  if [ "$phase $seen" != "${told:-}" ]; then
    told="$phase $seen"
    $dry_run || say "$name: $seen"
  fi
}

nap() {
  $dry_run || sleep "$poll"
}

# Returns when the workers can be reached; status 1 where they never will.
wait_until_ready() {
  note "until it is READY:"
  while :; do
    look_patiently
    case $phase in
      ready) return ;;
      waiting) nap ;;
      absent) failed "$name is not there: $(hint_create)" ;;
      still) failed "$name is $seen, by somebody's hand: start it, or $(hint delete)" ;;
      lost) return 1 ;;
    esac
  done
}

request() {
  local extra=()
  read -ra extra <<<"$create_flags"
  if $spot; then extra=(--spot ${extra[@]+"${extra[@]}"}); fi
  attempt "${queued[@]}" create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${extra[@]+"${extra[@]}"}
}

create() {
  note "is it there already?"
  look_patiently
  if ! $dry_run && [ "$phase" != absent ]; then
    failed "$name is there already, $seen: set it up, or $(hint delete)"
  fi
  if ! request; then
    # It may have come half the way, and wait there for its turn to be paid for.
    look || failed "$name was not created, and the cloud does not say what is there: $(why)"
    [ "$phase" = absent ] || failed "creating $name failed, and left it $seen: $(hint delete)"
    failed "$name was not created: gcloud says above why; nothing is left"
  fi
  wait_until_ready || failed "$name is $seen, and will not come: $(hint delete)"
}

# The checkout as it stands now. After a preemption the workers get again what they had.
pack() {
  call bash launch/pack.sh "$package" || failed "the code was not packed"
}

set_up() {
  local tries ready=false data_flag=
  # A node that is READY may still be starting its ssh.
  ssh_to all true
  for tries in 1 2 3 4 5; do
    if attempt "${where[@]}"; then
      ready=true
      break
    fi
    [ "$tries" = 5 ] || nap
  done
  $ready || return 1
  attempt "${reach[@]}" scp "$package" "$name:cfg_jax.tar.gz" "${place[@]}" --worker=all \
    ${more[@]+"${more[@]}"} || return 1
  [ -z "$data" ] || data_flag=" $(quoted --data="$data")"
  ssh_to all "rm -rf cfg_jax.next && mkdir cfg_jax.next && tar -xzf cfg_jax.tar.gz -C cfg_jax.next \
&& bash cfg_jax.next/launch/worker.sh setup$data_flag"
  attempt "${where[@]}"
}

setup() {
  wait_until_ready || failed "$name is $seen, and will not come: $(hint delete)"
  pack
  set_up || failed "$name is not set up: the lines above say on which worker; it stays as it is"
}

tell_job() {
  ssh_to "$1" "bash cfg_jax/launch/worker.sh $2"
  call "${where[@]}"
}

# ask_job WORKERS ANSWER: what worker.sh's state says; bare where nothing was shipped.
ask_job() {
  ssh_to "$1" "bash cfg_jax/launch/worker.sh state 2>/dev/null || echo bare"
  ask "$2" "${where[@]}"
}

start() {
  local what
  what=$(quoted ${env[@]+"${env[@]}"} "$job" "${flags[@]}")
  ssh_to all "bash cfg_jax/launch/worker.sh start $what"
  attempt "${where[@]}" && return
  # Those that did start would wait five minutes for the rest.
  tell_job all "stop $what" || true
  return 1
}

count_rerun() {
  [ $reruns -lt "$max_reruns" ] ||
    failed "$1, and --max_reruns=$max_reruns are used up: run again to go on"
  reruns=$((reruns + 1))
  say "$1: $2 ($reruns of $max_reruns)"
}

# Deletes and requests it, with patience: what failed may have been done all the same, so that each
# try begins with what is there. Deletions and requests are counted apart, and not anew: a
# request may fail each time, and leave what is to be deleted.
make_again() {
  local tries deletions=0 requests=0 what how
  while :; do
    case $phase,$seen in
      lost,*) # deleted first: a queued resource that was suspended never comes back
        what="deleted, to be made again"
        how="run again; how it is: $(hint status)"
        if attempt "${queued[@]}" delete "$name" "${place[@]}" --force --quiet; then
          phase=absent
          continue
        fi
        tries=$((deletions += 1))
        ;;
      absent,*)
        what="made again"
        how="$(hint_create), and run again"
        if request; then return; fi
        tries=$((requests += 1))
        ;;
      waiting,DELETING | waiting,SUSPENDING)
        nap
        look_patiently
        continue
        ;;
      *) return ;; # it is on its way, or there
    esac
    bear $tries "$name could not be $what" "$how"
    look_patiently
  done
}

# bear TRIES MESSAGE HOW: an attempt failed while the job is to go on. Returns when it is time to try
# again; ends where it was tried often enough or would fail again, and says how to go on.
bear() {
  local tries=$1 message=$2 how=$3
  ! is_mistaken || failed "$message: $(why tried). Without that mistake, to go on: $how"
  [ "$tries" -lt $patience ] ||
    failed "$message, tried $tries times: $(why tried). To go on: $how"
  say "$message: $(why tried): trying again ($tries of $patience)"
  nap
}

# A preemption shows in the job before the cloud says it. stays_ready N: N looks later, it is READY.
stays_ready() {
  local looks
  for ((looks = 0; looks < $1; looks++)); do
    nap
    look_patiently
    [ "$phase" = ready ] || return 1
  done
}

# What just failed on the workers is no wonder where the node has gone in between: then look on.
unless_it_is_gone() {
  look_patiently
  [ "$phase" = ready ] || return 0
  [ $patience -gt 1 ] || failed "$*: the lines above say on which worker"
  failures=$((failures + 1))
  bear $failures "$*" "run again; it costs until then, or until $(hint delete)"
}

not_started="the job did not start on every worker of $name, and was stopped on the others"

run() {
  local state reruns=0 started=false made_again=false silent=0 failures=0 last=''
  while :; do
    look_patiently
    case $phase in
      absent)
        if $started; then failed "$name was deleted: the job goes on from its workdir elsewhere"; fi
        failed "$name is not there: $(hint_create)"
        ;;
      still) failed "$name is $seen, by somebody's hand: start it, or $(hint delete)" ;;
      waiting)
        nap
        continue
        ;;
      lost)
        count_rerun "$name is gone ($seen)" "making it again"
        ! $made_again || $started || nap # it did not last until the job began
        patience=10 failures=0
        make_again
        started=false made_again=true
        continue
        ;;
    esac

    # ABSENT: the node is gone between the two questions, or is READY to the one and not the other.
    if ! state=$(ask_job 0 none) || [[ $state == ABSENT* ]]; then
      silent=$((silent + 1))
      [ $silent -lt 10 ] || failed "worker 0 of $name does not answer: $(why)"
      nap
      continue
    fi
    silent=0
    if [[ $state == bare* ]]; then
      { $made_again && [ -e "$package" ]; } || pack
      set_up || unless_it_is_gone "$name is not set up"
      continue
    fi
    if ! $started; then
      if start; then
        started=true patience=10 failures=0
        ! $nowatch || return 0
        say "watching; the job goes on without: $(hint logs)"
      else
        unless_it_is_gone "$not_started"
      fi
      continue
    fi

    case $state in
      running*)
        if [ "$state" != "$last" ]; then say "${state#running on }" && last=$state; fi
        nap
        ;;
      finished*)
        say "$state"
        return
        ;;
      stopped*) failed "the job was told to stop, and has: ${state#*: }" ;;
      "failed 2 on"*) failed "the job $state" ;; # the user's mistake
      failed*)
        stays_ready 2 || continue
        failed "the job $state. The whole log: $(hint logs)"
        ;;
      interrupted*)
        stays_ready 5 || continue
        # Another worker may have failed by itself, and taken this one along.
        state=$(ask_job all none | grep '^failed' | head -n 1) || true
        [ -z "$state" ] || failed "the job $state. The whole logs: $(hint logs) --worker=all"
        count_rerun "the job was interrupted, and $name is $seen still" "starting it again"
        started=false
        ;;
      none*)
        count_rerun "$name has lost the job" "starting it again"
        started=false
        ;;
      *) failed "worker 0 of $name says what it should not: $state" ;;
    esac
  done
}

dry_run_of_run() {
  note "is it there, and does the job run?"
  look
  ask_job 0 none >/dev/null
  note "where nothing was shipped yet: what setup does; then"
  start
  ! $nowatch || return 0
  note "every $poll s, until the job has ended:"
  look
  ask_job 0 none >/dev/null
  note "after a preemption, at most $max_reruns times:"
  phase=lost
  make_again
  wait_until_ready
  set_up
  start
}

case $verb in
  create | setup) "$verb" ;;
  run) if $dry_run; then dry_run_of_run; else run; fi ;;
  logs)
    follow=" -F"
    ! $nofollow || follow=''
    ssh_to "$worker" "tail -n $lines$follow cfg_jax_job/log"
    call "${where[@]}" || failed "no log came from worker $worker of $name: $(hint status)"
    ;;
  status)
    state=$(ask ACTIVE "${queued[@]}" describe "$name" "${place[@]}" '--format=value(state.state)') ||
      failed "the cloud does not say how $name is: $(why)"
    $dry_run || echo "queued resource: ${state/ABSENT/not there}"
    state=$(ask READY "${node[@]}" describe "$name" "${place[@]}" '--format=value(state)') ||
      failed "the cloud does not say how $name is: $(why)"
    $dry_run || echo "node: ${state/ABSENT/not there}"
    if [ "$state" = READY ]; then
      state=$(ask_job "$worker" none) || failed "worker $worker of $name does not answer: $(why)"
      $dry_run || echo "job: $state"
    fi
    ;;
  stop) tell_job all stop || failed "not every worker of $name was told: $(hint status)" ;;
  delete)
    look_patiently
    if [ "$phase" != absent ]; then
      call "${queued[@]}" delete "$name" "${place[@]}" --force --quiet ||
        failed "$name could not be deleted: it is $seen, and may cost: $(hint status)"
    else
      # A node that was made by other means has no queued resource.
      state=$(ask READY "${node[@]}" describe "$name" "${place[@]}" '--format=value(state)') ||
        failed "the cloud does not say how $name is: $(why)"
      if [ "$state" = ABSENT ]; then
        say "$name is not there: nothing to delete"
      else
        call "${node[@]}" delete "$name" "${place[@]}" --quiet ||
          failed "$name could not be deleted: it is $state, and may cost: $(hint status)"
      fi
    fi
    ;;
esac
