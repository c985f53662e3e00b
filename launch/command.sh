# shellcheck shell=bash
# Sourced by tpu.sh, slurm.sh and jobset.sh: their command lines, a mistake in one line, and commands
# that are printed or run. Runs in the bash 3.2 of macOS too: no ${x@Q}, no mapfile, and a guard
# where an array may be empty.

# What the options of all three are, if they are not given.
dry_run=false job=train workdir='' flags=() env=()

# The user's mistake: one line, and status 2.
mistake() {
  echo "error: $*" >&2
  exit 2
}

# What was called did not do it: one line, and status 1.
failed() {
  echo "error: $*" >&2
  exit 1
}

# What is going on, on standard error: standard output is for what was asked for.
say() {
  echo "== $*" >&2
}

# The head of a script is its manual.
show_help() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$1"
}

# take_options "NAME NAME ..." "SWITCH ..." ARGUMENTS: sets $NAME to what --NAME=value says and
# $SWITCH to true where --SWITCH stands; what follows -- goes to the array `flags`. --env=NAME=VALUE
# may come again and again, for the array `env`.
take_options() {
  local known=$1 switches=$2 word option
  shift 2
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      --) flags=("$@") && return ;;
      --config | --config=* | --config.*) mistake "$word is the job's: put its flags after --" ;;
      --*=*)
        option=${word%%=*} option=${option#--}
        case " $switches " in *" $option "*) mistake "--$option takes no value" ;; esac
        case " $known " in *" $option "*) ;; *) no_option "--$option" "$known" "$switches" ;; esac
        [ -n "${word#*=}" ] || mistake "--$option is empty: write --$option=value"
        if [ "$option" = env ]; then
          case ${word#*=} in [A-Za-z_]*=*) ;; *) mistake "$word: must be --env=NAME=VALUE" ;; esac
          env+=("${word#*=}")
        else
          printf -v "$option" %s "${word#*=}"
        fi
        ;;
      --?*)
        option=${word#--}
        case " $known " in *" $option "*) mistake "write --$option=value" ;; esac
        case " $switches " in *" $option "*) ;; *) no_option "--$option" "$known" "$switches" ;; esac
        printf -v "$option" %s true
        ;;
      *) mistake "'$word' is not an option: write --name=value, and the job's flags after --" ;;
    esac
  done
}

no_option() {
  local all="$2 $3"
  mistake "$1 is not one of --${all// / --}; the job's flags go after --"
}

is_whole_number() {
  case $1 in '' | *[!0-9]*) return 1 ;; esac
}

# check_bucket --OPTION VALUE, which may be empty.
check_bucket() {
  case $2 in
    '') ;;
    *[!A-Za-z0-9_./:-]*) mistake "$1=$2: must be gs://BUCKET/FOLDER" ;;
    gs://?*) ;;
    *) mistake "$1=$2: must be gs://BUCKET/FOLDER" ;;
  esac
}

# Checks $job and the array `flags`, and puts --workdir, which may stand on either side of --, among
# them. check_job gs:// demands a bucket, where the machines' disks do not last.
check_job() {
  local flag where=
  [ -z "$workdir" ] || flags=("--workdir=$workdir" ${flags[@]+"${flags[@]}"})
  case $job in
    train | sample | evaluate) ;;
    *) mistake "--job=$job: must be train, sample or evaluate" ;;
  esac
  for flag in ${flags[@]+"${flags[@]}"}; do
    case $flag in
      --workdir=*)
        [ -z "$where" ] || mistake "--workdir is there twice: $where and ${flag#*=}"
        where=${flag#*=}
        ;;
      --*) ;;
      *) mistake "'$flag' is not a flag of the job: write --name=value" ;;
    esac
  done
  [ -n "$where" ] ||
    mistake "--workdir is missing: end with -- --config=NAME --workdir=${1:+$1BUCKET/}FOLDER"
  case $where in
    "${1:-}"?*) ;;
    *) mistake "--workdir=$where: must be $1BUCKET/FOLDER, for the machines' disks go with them" ;;
  esac
  # So that a run which was told to leave is not taken for one that is at its end.
  [ "$job" != train ] || flags+=(--unfinished_status=75)
}

# One word as a shell reads it back; of --name='a value' the value alone is quoted.
quote() {
  local LC_ALL=C name=
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) ;;
    *) printf %s "$1" && return ;;
  esac
  case $1 in --*=*) name=${1%%=*}= ;; esac
  case $name in *[!A-Za-z0-9_./:=,@%+-]*) name= ;; esac
  printf "%s'" "$name"
  printf %s "${1#"$name"}" | sed "s/'/'\\\\''/g"
  printf "'"
}

# Words as one line that a shell reads back.
quoted() {
  local word gap=
  for word in "$@"; do
    printf %s "$gap"
    quote "$word"
    gap=' '
  done
}

# call COMMAND: prints it in a dry run; else shows it, and runs it.
call() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    echo "\$ $(quoted "$@")" >&2
    "$@"
  fi
}

# A comment among the commands of a dry run.
note() {
  if $dry_run; then echo "# $*"; fi
}
