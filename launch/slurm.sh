#!/bin/bash
# GPT-2 124M on two nodes with eight GPUs each, one task per GPU: sbatch launch/slurm.sh
#
# A preempted or failed job is queued again and continues from its last checkpoint. Before the time limit the job is
# told to save. DATA and RUN are on a file system that all nodes share; .venv is an environment with gptjax[cuda].
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

DATA=${DATA:-/shared/openwebtext}
RUN=${RUN:-/shared/runs/gpt2_124m}

srun --kill-on-bad-exit=1 .venv/bin/gptjax train --config gpt2_124m --data.source "$DATA" --out_dir "$RUN" --auto_resume
code=$?
[ $code -eq 0 ] || [ $code -eq 2 ] || scontrol requeue "$SLURM_JOB_ID" # 2: a mistake in the command
exit $code
