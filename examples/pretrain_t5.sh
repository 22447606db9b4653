#!/bin/bash
# T5-220M on one node, in the style of Megatron-LM's README.
#
# An encoder of 512 tokens and a decoder of 128. On eight GPUs add --nproc 8, and --tp 2 or
# --pp 2 to share the model. First make the dataset, of sentences:
#   mtk preprocess --input my_corpus.jsonl --output-prefix my-t5 \
#     --tokenizer-type BertWordPieceLowerCase --vocab-file bert-vocab.txt \
#     --vocab-extra-ids 100 --split-sentences
# Repeating this command continues from the newest checkpoint. See the cost first by
# replacing pretrain with plan.
set -euo pipefail

DATA_PATH=${DATA_PATH:-my-t5_text_sentence}
CHECKPOINT_PATH=${CHECKPOINT_PATH:-checkpoints/t5}

mtk pretrain \
    --family t5 \
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 \
    --kv-channels 64 --ffn-hidden-size 3072 \
    --seq-length 512 --max-position-embeddings 512 --decoder-seq-length 128 \
    --micro-batch-size 16 --global-batch-size 128 \
    --train-iters 1000000 \
    --lr 0.0001 --min-lr 0.00001 --lr-decay-style linear \
    --lr-decay-iters 1000000 --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 --clip-grad 1.0 \
    --bf16 \
    --data-path "$DATA_PATH" --split 949,50,1 \
    --log-interval 100 --eval-interval 1000 --eval-iters 10 \
    --save "$CHECKPOINT_PATH" --save-interval 10000 \
    "$@"
