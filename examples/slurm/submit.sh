#!/bin/bash
# Finetunes every task in a job of its own, and merges when all have succeeded; a job that failed can be submitted again,
# since what is done stays done. All jobs share the run folder that the configuration names.
#
#     examples/slurm/submit.sh configs/quickstart.yaml news_topic word_valence emoji_language part_of_speech
#
# Overlays follow the configuration after commas: configs/paper/vit_b32.yaml,configs/paper/slurm.yaml. What the cluster
# asks for beyond that (a GPU, a partition) may be given as sbatch's own variables: SBATCH_GPUS_PER_NODE=1, …
#
# On a machine without SLURM, the stand-ins in local/ run the same scripts as processes:
#
#     PATH=examples/slurm/local:$PATH examples/slurm/submit.sh …
set -euo pipefail
here=$(dirname "$0")
sbatch --dependency=afterok:"$(sbatch --parsable --array=0-$(($# - 2)) "$here/finetune.sbatch" "$@")" "$here/merge.sbatch" "$1"
