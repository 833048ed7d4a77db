#!/bin/sh
# Writes the passwords of compose.yaml into .env, readable by its owner only. What is there already stays.
set -eu
cd "$(dirname "$0")/../.."
umask 077
touch .env
chmod 600 .env
for name in RABBITMQ_PASSWORD REDIS_PASSWORD S3_SECRET_KEY GRAFANA_PASSWORD; do
    if ! grep -q "^$name=" .env; then
        printf '%s=%s\n' "$name" "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >>.env
    fi
done
grep -q '^COMPOSE_PROFILES=' .env || echo 'COMPOSE_PROFILES=cpu' >>.env
echo "passwords are in .env"
