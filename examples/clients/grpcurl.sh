#!/bin/sh
# The whole loop by hand, with grpcurl (https://github.com/fullstorydev/grpcurl). The services
# describe themselves by gRPC reflection, so that no .proto file is needed.
#
#   toile up
#   sh examples/clients/grpcurl.sh FOLDER      # of JPEGs; writes refined.png
#
# `toile status` shows the addresses; each can be given: DATASET=127.0.0.1:9001 sh grpcurl.sh …
set -eu

FOLDER=${1:?"a folder of JPEGs is missing"}
STEPS=${STEPS:-150}
GRPCURL=${GRPCURL:-grpcurl}
STATE=${TOILE_HOME:-$HOME/.toile}/run/platform.json
address() { sed -n "s/.*\"$1_address\": \"\([^\"]*\)\".*/\1/p" "$STATE" | head -n 1; }
DATASET=${DATASET:-$(address dataset)}
TRAIN=${TRAIN:-$(address train)}
GENERATE=${GENERATE:-$(address generate)}
RANK=${RANK:-$(address rank)}
REFINE=${REFINE:-$(address refine)}

call() { "$GRPCURL" -plaintext -d "$3" "$1" "toile.v1.$2"; }
first() { sed -n "s/.*\"$1\": \"\([^\"]*\)\".*/\1/p" | head -n 1; }  # a field's first value
images() { grep -o 'projects/default/images/[0-9a-f]*' | awk '!seen[$0]++'; }

# What is there.
"$GRPCURL" -plaintext "$DATASET" list
"$GRPCURL" -plaintext "$DATASET" describe toile.v1.DatasetService

# Photographs. Bytes travel in base64, in pieces of at most 1 MiB; these files are smaller.
call "$DATASET" DatasetService/CreateDataset \
  '{"parent": "projects/default", "dataset_id": "grpcurl", "trigger_word": "<mine>"}'
{
  echo '{"header": {"dataset": "projects/default/datasets/grpcurl"}}'
  for photograph in "$FOLDER"/*.jpg; do
    printf '{"file": {"file_name": "%s"}}\n' "$(basename "$photograph")"
    printf '{"chunk": "%s"}\n' "$(base64 -w 0 < "$photograph")"
  done
} | call "$DATASET" DatasetService/ImportImages @

# A version of the dataset, and a style: jobs, followed to their end.
job=$(call "$DATASET" DatasetService/BuildDatasetVersion \
  '{"dataset": "projects/default/datasets/grpcurl"}')
version=$(echo "$job" | first target)
call "$DATASET" JobService/WatchJob "{\"name\": \"$(echo "$job" | first name)\"}"
job=$(call "$TRAIN" TrainService/CreateTrainingJob "{
  \"parent\": \"projects/default\", \"model_id\": \"grpcurl\",
  \"dataset\": \"$version\", \"lora\": {\"steps\": $STEPS}
}")
model=$(echo "$job" | first target)
call "$TRAIN" JobService/WatchJob "{\"name\": \"$(echo "$job" | first name)\"}"

# Four designs; the best of them; the best of them in blue.
designs=$(call "$GENERATE" GenerateService/Generate "{
  \"parent\": \"projects/default\", \"prompt\": \"<mine>, a white dress\", \"count\": 4, \"seed\": 7,
  \"adapters\": [{\"model\": \"$model\"}]
}" | images | sed 's/.*/"&"/' | paste -s -d ,)
best=$(call "$RANK" RankService/RankImages "{
  \"parent\": \"projects/default\", \"images\": [$designs], \"dataset\": \"$version\"
}" | sed '1,/"ranking"/d' | images | head -n 1)
refined=$(call "$REFINE" RefineService/RefineImage \
  "{\"image\": \"$best\", \"instruction\": \"make it blue\", \"seed\": 7}" |
  sed '1,/"refinement"/d' | sed '1,/"image"/d' | images | head -n 1)
call "$GENERATE" GenerateService/DownloadImage "{\"name\": \"$refined\"}" |
  sed -n 's/.*"chunk": "\([^"]*\)".*/\1/p' | while read -r piece; do
    echo "$piece" | base64 -d
  done > refined.png
echo "refined.png is $best in blue"
