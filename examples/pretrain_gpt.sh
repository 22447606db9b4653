#!/bin/bash
# GPT-345M on one node, in the style of Megatron-LM's README. Runs as it is on one GPU (or,
# slowly, on a CPU); on eight GPUs with --nproc 8 --global-batch-size 32, and --tp 2 or --pp 2 to
# share the model. Several nodes: see docs/launch.md. First make the dataset:
#   mtk preprocess --input my_corpus.jsonl --output-prefix my-gpt2 \
#     --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json \
#     --merge-file gpt2-merges.txt --append-eod
# Repeating this command continues from the newest checkpoint. See the cost first by
# replacing pretrain with plan.
set -euo pipefail

DATA_PATH=${DATA_PATH:-my-gpt2_text_document}
CHECKPOINT_PATH=${CHECKPOINT_PATH:-checkpoints/gpt2}

mtk pretrain \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --seq-length 1024 --max-position-embeddings 1024 \
    --micro-batch-size 4 --global-batch-size 8 \
    --train-iters 500000 \
    --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine \
    --lr-decay-iters 320000 --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 --clip-grad 1.0 \
    --bf16 \
    --data-path "$DATA_PATH" --split 949,50,1 \
    --log-interval 100 --eval-interval 1000 --eval-iters 10 \
    --save "$CHECKPOINT_PATH" --save-interval 10000 \
    "$@"
