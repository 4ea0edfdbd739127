#!/bin/sh
# The services by hand, with grpcurl (https://github.com/fullstorydev/grpcurl). They describe
# themselves by gRPC reflection, so that no .proto file is needed.
#
#   toile up
#   sh examples/clients/grpcurl.sh
#
# `toile status` shows the addresses; each can be given: DATASET=127.0.0.1:9001 sh grpcurl.sh
set -eu

GRPCURL=${GRPCURL:-grpcurl}
STATE=${TOILE_HOME:-$HOME/.toile}/run/platform.json
address() { sed -n "s/.*\"$1_address\": \"\([^\"]*\)\".*/\1/p" "$STATE" | head -n 1; }
DATASET=${DATASET:-$(address dataset)}
TRAIN=${TRAIN:-$(address train)}
GENERATE=${GENERATE:-$(address generate)}
RANK=${RANK:-$(address rank)}

call() { "$GRPCURL" -plaintext -d "$3" "$1" "$2"; }

# What is there.
"$GRPCURL" -plaintext "$DATASET" list
"$GRPCURL" -plaintext "$DATASET" describe toile.v1.DatasetService
call "$GENERATE" grpc.health.v1.Health/Check '{}'

# Datasets, models and jobs.
call "$DATASET" toile.v1.DatasetService/ListDatasets '{"parent": "projects/default"}'
call "$TRAIN" toile.v1.TrainService/ListModels '{"parent": "projects/default"}'
call "$TRAIN" toile.v1.TrainService/ListBases '{}'
call "$TRAIN" toile.v1.JobService/ListJobs '{"parent": "projects/default", "page_size": 5}'
call "$RANK" toile.v1.RankService/ListScorers '{}'

# A design, with its steps as they happen. Bytes are fetched with DownloadImage.
call "$GENERATE" toile.v1.GenerateService/Generate '{
  "parent": "projects/default",
  "prompt": "a red dress",
  "count": 1,
  "seed": 7,
  "request_id": "grpcurl-example-1"
}'
