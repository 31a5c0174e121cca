#!/bin/bash
# GPT-2 124M on the hosts of a TPU slice, from a laptop with gcloud: DATA=gs://BUCKET/openwebtext launch/tpu_vm.sh
#
# Creates the slice if it does not exist, copies this checkout to all hosts, installs it, mounts the folder for runs,
# which all hosts share, and starts or continues the run on every host. train.log on worker 0 shows its progress:
#
#     gcloud compute tpus tpu-vm ssh gptjax --worker 0 --zone us-west4-a --command 'tail -f gptjax/train.log'
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=${NAME:-gptjax}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
NFS=${NFS:?is the folder for runs, as ADDRESS:/SHARE of a Filestore instance}
DATA=${DATA:?is the folder of token files, as gs://BUCKET/openwebtext}

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }
on_all() { tpu ssh "$NAME" --worker all --command "$1"; }

tpu describe "$NAME" >/dev/null 2>&1 || tpu create "$NAME" --accelerator-type "$TYPE" --version "$IMAGE"
git archive --format tar.gz --prefix gptjax/ --output /tmp/gptjax.tar.gz HEAD
tpu scp /tmp/gptjax.tar.gz "$NAME:" --worker all
on_all "set -e
    tar -xzf gptjax.tar.gz
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    cd gptjax && ~/.local/bin/uv venv --allow-existing --python 3.12 && ~/.local/bin/uv pip install '.[tpu,data]'
    sudo apt-get install -y -q nfs-common
    sudo mkdir -p /mnt/runs
    mountpoint -q /mnt/runs || sudo mount -o rw '$NFS' /mnt/runs
    sudo chmod 777 /mnt/runs"
on_all "cd gptjax && nohup .venv/bin/gptjax train --config gpt2_124m --data.source '$DATA' \
    --out_dir /mnt/runs/gpt2_124m --auto_resume > train.log 2>&1 < /dev/null &"
