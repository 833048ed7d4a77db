#!/usr/bin/env bash
# Runs the overlay `try` on kind, from nothing to results, and breaks things on the way:  k8s/e2e.sh
#
# It needs Docker, kind and kubectl, and inferq's command line (`make setup && . .venv/bin/activate`). It takes 10 to
# 20 minutes, most of them for the images. KEEP=1 leaves the cluster behind.
#
# This script was written without Docker at hand, and has not been run. Please report what it finds.
set -euo pipefail
cd "$(dirname "$0")/.."

cluster=inferq-e2e
images=(gateway callbacks echo ner ocr)

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nFAILED: %s\n' "$*" >&2; exit 1; }
k() { kubectl --context "kind-$cluster" --namespace inferq "$@"; }
available() { k wait --for=condition=Available --timeout=10m "$@"; }

for program in docker kind kubectl inferq; do
    command -v "$program" >/dev/null || fail "$program is not installed"
done

work=$(mktemp -d)
forward=
end() {
    status=$?
    [ "$status" = 0 ] || k get pods --output wide || true
    [ -z "$forward" ] || kill "$forward" || true
    [ -n "${KEEP:-}" ] || kind delete cluster --name "$cluster" || true
    rm -rf "$work"
    exit "$status"
}
trap end EXIT

say "a cluster"
kind create cluster --name "$cluster" --wait 5m

say "images"
for image in "${images[@]}"; do
    docker build --quiet --target "$image" --tag "inferq-$image:try" .
    kind load docker-image --name "$cluster" "inferq-$image:try"
done

say "the overlay"
k apply -f k8s/overlays/try/namespace.yaml
k8s/overlays/try/secrets.sh 2>"$work/key" | k apply -f -
k apply -k k8s/overlays/try
k wait --for=condition=Complete --timeout=10m job/bucket
available deployment --all

k port-forward service/gateway 8000:80 >/dev/null &
forward=$!
INFERQ_API_KEY=$(sed -n 's/^INFERQ_API_KEY=//p' "$work/key")
export INFERQ_API_KEY INFERQ_API_URL=http://127.0.0.1:8000
for _ in $(seq 60); do
    curl --silent --fail "$INFERQ_API_URL/readyz" >/dev/null && break
    sleep 1
done

say "a result of each type"
inferq submit echo '{"hello": 1}' --wait
inferq submit ner "张伟在北京大学工作。" --wait
inferq submit ocr examples/pages/*.png --wait

say "a task waits while there is no worker"
k scale deployment/worker-echo --replicas=0
k wait --for=delete pod --selector inferq.dev/type=echo --timeout=10m
inferq submit echo '{"hello": 2}' --id e2e-waits
k scale deployment/worker-echo --replicas=2
available deployment/worker-echo
inferq result e2e-waits --wait 120

say "a worker that waits for the object store stays ready"
k scale deployment/seaweedfs --replicas=0
inferq submit echo '{"hello": 3}' --id e2e-outage
sleep 60
[ "$(k get deployment/worker-echo --output 'jsonpath={.status.readyReplicas}')" = 2 ] ||
    fail "a worker is not ready in an outage of the object store"
k scale deployment/seaweedfs --replicas=1
available deployment/seaweedfs
inferq result e2e-outage --wait 300

say "RabbitMQ restarts"
k rollout restart deployment/rabbitmq
k rollout status deployment/rabbitmq --timeout=10m
for _ in $(seq 60); do
    inferq submit echo '{"hello": 4}' --id e2e-restart && break
    sleep 1
done
inferq result e2e-restart --wait 120

say "no pod of ours reaches the API of Kubernetes"
if k exec deployment/worker-echo -- python -c \
    "import socket; socket.create_connection(('kubernetes.default.svc', 443), timeout=5)" 2>/dev/null; then
    fail "a worker reaches the API of Kubernetes"
fi

say "everything passed"
