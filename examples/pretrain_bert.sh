#!/bin/bash
# BERT-345M on one node, in the style of Megatron-LM's README.
#
# This version plans BERT but does not train it: mtk pretrain refuses --family bert, so
# this script plans. The dataset can be made already:
#   mtk preprocess --input my_corpus.jsonl --output-prefix my-bert \
#     --tokenizer-type BertWordPieceLowerCase --vocab-file bert-vocab.txt --split-sentences
set -euo pipefail

DATA_PATH=${DATA_PATH:-my-bert_text_sentence}
CHECKPOINT_PATH=${CHECKPOINT_PATH:-checkpoints/bert}

mtk plan --gpus 1 --gpu a100 \
    --family bert \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --seq-length 512 --max-position-embeddings 512 \
    --micro-batch-size 4 --global-batch-size 32 \
    --train-iters 1000000 \
    --lr 0.0001 --min-lr 0.00001 --lr-decay-style linear \
    --lr-decay-iters 990000 --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 --clip-grad 1.0 \
    --fp16 \
    --data-path "$DATA_PATH" --split 949,50,1 \
    --log-interval 100 --eval-interval 1000 --eval-iters 10 \
    --save "$CHECKPOINT_PATH" --save-interval 10000 \
    "$@"
