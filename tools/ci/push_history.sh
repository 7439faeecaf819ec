#!/usr/bin/env bash
# Adds a result of pytest-benchmark to history.jsonl in the branch "benchmarks", for the commit that is checked out, and pushes the branch.
set -euo pipefail
result=$(realpath "$1")
cd "$(dirname "$0")/../.."
commit=$(git rev-parse HEAD)
folder=$(mktemp -d)
trap 'git worktree remove --force "$folder"' EXIT
if git fetch -q origin benchmarks 2>/dev/null; then
  git worktree add -q --detach "$folder" FETCH_HEAD
else
  git worktree add -q --detach "$folder"
  git -C "$folder" checkout -q --orphan benchmarks
  git -C "$folder" rm -rqf .
fi
python3 tools/ci/benchmark_history.py "$result" "$commit" "$folder/history.jsonl" "$folder/README.md"
git -C "$folder" add history.jsonl README.md
git -C "$folder" -c user.name=benchmark -c user.email=benchmark@users.noreply.invalid commit -q -m "Add the benchmark of ${commit:0:12}"
git -C "$folder" push -q origin HEAD:refs/heads/benchmarks
