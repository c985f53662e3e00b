#!/usr/bin/env bash
# TPUs on Kubernetes: fills in launch/jobset.yaml and applies it, to the cluster that kubectl talks
# to (GKE, with the JobSet controller and a node pool of that slice).
#
#   bash launch/pack.sh - | docker build -f launch/Dockerfile -t IMAGE - && docker push IMAGE
#   bash launch/jobset.sh OPTIONS -- JOB'S FLAGS
#
#   --name=NAME               of the JobSet
#   --image=IMAGE             with cfg_jax inside
#   --topology=v5e:16x16      the slice, as `python -m cfg_jax.plan` writes it: v4, v5e, v5p or v6e
#   --chips_per_host=4        if the node pool's machines have 1 or 8
#   --spot                    on spot nodes
#   --workdir=gs://BUCKET/FOLDER   here or among the job's flags
#   --data=gs://BUCKET/DATA   copied to every host first, where data sets are looked for
#   --service_account=default Kubernetes' own, that may read and write the buckets
#   --namespace=N             if not kubectl's own
#   --job=train               or sample, evaluate
#   --env=NAME=VALUE          in the job's environment; as often as needed
#   --max_reruns=20           how often it is started again, after preemptions and failures
#   --dry_run                 prints the command, which can be pasted, and runs none
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

name='' image='' topology='' chips_per_host='' data='' service_account=default namespace=''
max_reruns=20 spot=false

case ${1:-} in '' | help | --help | -h) show_help "${BASH_SOURCE[0]}" && exit ;; esac
take_options "name image topology chips_per_host workdir data service_account namespace job env \
max_reruns" "spot dry_run" "$@"
no_such_slice() {
  mistake "--topology=$topology: must be v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, in chips"
}

case $name in
  '') mistake "--name is missing: what is the JobSet to be called?" ;;
  [!a-z]* | *[!a-z0-9-]* | *-) mistake "--name=$name: must be of a-z, 0-9 and -, and begin with a-z" ;;
esac
[ -n "$image" ] ||
  mistake "--image is missing: bash launch/pack.sh - | docker build -f launch/Dockerfile -t IMAGE -"
case $topology in
  v4:*) accelerator=tpu-v4-podslice ;;
  v5e:*) accelerator=tpu-v5-lite-podslice ;;
  v5p:*) accelerator=tpu-v5p-slice ;;
  v6e:*) accelerator=tpu-v6e-slice ;;
  '') mistake "--topology is missing, as in --topology=v5e:4x4" ;;
  *) no_such_slice ;;
esac
shape=${topology#*:} chips=1
IFS=x read -ra sides <<<"$shape"
case $topology,${#sides[@]} in
  v5e:*,2 | v6e:*,2 | v4:*,3 | v5p:*,3) ;;
  *) no_such_slice ;;
esac
for side in "${sides[@]}"; do
  case $side in '' | 0* | *[!0-9]*) no_such_slice ;; esac
  chips=$((chips * side))
done
[ -n "$chips_per_host" ] || chips_per_host=$((chips < 4 ? chips : 4))
case $chips_per_host in
  1 | 2 | 4 | 8) ;;
  *) mistake "--chips_per_host=$chips_per_host: must be 1, 4 or 8" ;;
esac
[ $((chips % chips_per_host)) = 0 ] ||
  mistake "--chips_per_host=$chips_per_host: must divide the $chips chips of $topology"
is_whole_number "$max_reruns" || mistake "--max_reruns=$max_reruns: must be a whole number"
check_bucket --data "$data"
check_job gs://
[ -z "$data" ] || env=(TFDS_DATA_DIR=/data ${env[@]+"${env[@]}"})

# A string as YAML and JSON both read it.
json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

json_list() {
  local item gap=
  printf '['
  for item in "$@"; do
    printf %s "$gap"
    json "$item"
    gap=', '
  done
  printf ']'
}

json_env() {
  local pair gap=
  printf '['
  for pair in "$@"; do
    printf '%s{"name": %s, "value": %s}' "$gap" "$(json "${pair%%=*}")" "$(json "${pair#*=}")"
    gap=', '
  done
  printf ']'
}

# fill NAME VALUE: one ${NAME} of $line; by cutting, because a pattern's replacement has letters with
# a meaning.
fill() {
  local mark="\${$1}"
  case $line in *"$mark"*) line=${line%%"$mark"*}$2${line#*"$mark"} ;; esac
}

manifest() {
  local line hosts=$((chips / chips_per_host)) json_flags json_envs json_image json_account
  json_flags=$(json_list "${flags[@]}")
  json_envs=$(json_env ${env[@]+"${env[@]}"})
  json_image=$(json "$image")
  json_account=$(json "$service_account")
  while IFS= read -r line; do
    case $line in
      '#'*) continue ;;
      *'  # --spot') $spot || continue ;;
      *'  # --data') [ -n "$data" ] || continue ;;
    esac
    line=${line%  # --spot}
    line=${line%  # --data}
    fill NAME "$name"
    fill MAX_RERUNS "$max_reruns"
    fill HOSTS "$hosts"
    fill CHIPS_PER_HOST "$chips_per_host"
    fill SERVICE_ACCOUNT "$json_account"
    fill ACCELERATOR "$accelerator"
    fill TOPOLOGY "$shape"
    fill IMAGE "$json_image"
    fill JOB "$job"
    fill FLAGS "$json_flags"
    fill ENV "$json_envs"
    fill DATA "$data"
    printf '%s\n' "$line"
  done <"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml"
}

apply=(kubectl apply ${namespace:+--namespace="$namespace"} --filename=-)
if $dry_run; then
  echo "$(quoted "${apply[@]}") <<'EOF'"
  manifest
  echo EOF
  exit
fi
command -v kubectl >/dev/null || mistake "there is no kubectl here: install it, or use --dry_run"
manifest | call "${apply[@]}" || failed "$name was not applied: kubectl says above why"
say "its pods:  $(quoted kubectl get pods ${namespace:+--namespace="$namespace"} \
  --selector="jobset.sigs.k8s.io/jobset-name=$name")"
say "its log:   $(quoted kubectl logs ${namespace:+--namespace="$namespace"} --follow \
  "job/$name-slice-0")"
say "its end:   $(quoted kubectl delete ${namespace:+--namespace="$namespace"} jobset "$name")"
