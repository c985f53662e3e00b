#!/usr/bin/env bash
# The checkout as it stands, new files too, less what git ignores: bash launch/pack.sh FILE.tar.gz
# With - for the file it goes to standard output:
#   bash launch/pack.sh - | docker build -f launch/Dockerfile -t IMAGE -
set -euo pipefail
case ${1:-} in
  -) file=/dev/stdout ;;
  /*) file=$1 ;;
  ?*) file=$PWD/$1 ;;
  *) echo "error: say where to: bash launch/pack.sh FILE.tar.gz" >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! prefix=$(git rev-parse --show-prefix 2>/dev/null); then
  echo "error: this is not a git checkout, and only git knows what belongs to it" >&2
  exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# An index aside: what the user has staged stays as it is.
export GIT_INDEX_FILE="$scratch/index"
git add --all .
tree=$(git write-tree ${prefix:+--prefix="$prefix"})
git archive --format=tar.gz --output="$scratch/code.tar.gz" "$tree"
[ "$file" = /dev/stdout ] || mkdir -p "$(dirname "$file")"
cat "$scratch/code.tar.gz" >"$file"
