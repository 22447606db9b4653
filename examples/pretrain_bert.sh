#!/bin/bash
# BERT-345M on one node, in the style of Megatron-LM's README.
#
# On eight GPUs add --nproc 8, and --tp 2 or --pp 2 to share the model. First make the dataset,
# of sentences:
#   mtk preprocess --input my_corpus.jsonl --output-prefix my-bert \
#     --tokenizer-type BertWordPieceLowerCase --vocab-file bert-vocab.txt --split-sentences
# Repeating this command continues from the newest checkpoint. See the cost first by
# replacing pretrain with plan.
set -euo pipefail

DATA_PATH=${DATA_PATH:-my-bert_text_sentence}
CHECKPOINT_PATH=${CHECKPOINT_PATH:-checkpoints/bert}

mtk pretrain \
    --family bert \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --seq-length 512 --max-position-embeddings 512 \
    --micro-batch-size 4 --global-batch-size 32 \
    --train-iters 1000000 \
    --lr 0.0001 --min-lr 0.00001 --lr-decay-style linear \
    --lr-decay-iters 990000 --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 --clip-grad 1.0 \
    --bf16 \
    --data-path "$DATA_PATH" --split 949,50,1 \
    --log-interval 100 --eval-interval 1000 --eval-iters 10 \
    --save "$CHECKPOINT_PATH" --save-interval 10000 \
    "$@"
