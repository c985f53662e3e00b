#!/usr/bin/env bash
# The paper's claim on real images, in one command: bash launch/demo.sh [FOLDER]
#
# Trains a denoiser with and without labels, a noisy classifier (the rival that guides) and a judge
# (a classifier of clean images that scores) on handwritten digits, and sweeps w for both kinds of
# guidance. Run again, it uses what is there.
#
# The arithmetic, on two slow cores (2 GHz, AVX2, 0.13 s a step and 0.24 ms an image a pass):
#   denoiser    800 steps of 128, 0.21M parameters                     2 min
#   classifier  400 steps, judge 300                                   2 min
#   sweep       2 x 5 points x 500 images x 32 levels x 1 or 2 passes  2 min, with the scores
set -euo pipefail
EXTRAS="" . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
runs=${1:-runs/demo}

train() {
  echo "== $1: $runs/$1"
  python -m cfg_jax.train --config="$1" --workdir="$runs/$1" --config.train.steps="$2" \
    --config.train.sample_every=0
}
train digits 800
train digits_classifier 400
train digits_judge 300
echo "== sweep: $runs/sweep"
python -m cfg_jax.evaluate --workdir="$runs/digits" --classifier="$runs/digits_classifier" \
  --judge="$runs/digits_judge" --w=0,0.1,0.5,1,4 --num_samples=500 --config.sample.steps=32 \
  --out="$runs/sweep"
