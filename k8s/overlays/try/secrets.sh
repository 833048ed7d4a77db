#!/bin/sh
# Prints the Secrets of this overlay, with new random passwords, for `kubectl apply -f -`; and the API key to stderr.
# It needs `inferq` and `kubectl`: `make setup && . .venv/bin/activate`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
secret() {
    echo ---
    name=$1
    shift
    kubectl create secret generic "$name" --namespace inferq --dry-run=client --output yaml "$@"
}

rabbitmq=$(random)
redis=$(random)
s3=$(random)
cat >"$folder/s3.json" <<END
{"identities": [
  {"name": "inferq", "credentials": [{"accessKey": "inferq", "secretKey": "$s3"}], "actions": ["Admin"]}
]}
END
key=$(inferq keys add default --file "$folder/api-keys.json" 2>/dev/null)
inferq secrets rotate default --file "$folder/webhook-secrets.json" >/dev/null

secret inferq-services --from-literal=rabbitmq-password="$rabbitmq" --from-literal=redis-password="$redis" \
    --from-file="$folder/s3.json"
secret inferq-api-keys --from-file="$folder/api-keys.json"
secret inferq-webhook-secrets --from-file="$folder/webhook-secrets.json"
for part in gateway worker callbacks batches beat monitor; do
    secret "inferq-$part" \
        --from-literal=INFERQ_AMQP_URL="amqp://inferq:$rabbitmq@rabbitmq:5672/%2F" \
        --from-literal=INFERQ_REDIS_URL="redis://:$redis@valkey:6379/0" \
        --from-literal=AWS_ACCESS_KEY_ID=inferq --from-literal=AWS_SECRET_ACCESS_KEY="$s3"
done
echo "INFERQ_API_KEY=$key" >&2
