#!/usr/bin/env bash
# The main job with the van-deploy in $1 (a folder of programs), in a new folder outside
# the checkout: smoke.sh .venv-min/bin
set -euo pipefail
van_deploy="$(cd "$1" && pwd)/van-deploy"
folder="$(mktemp -d)"
server=""
trap 'rm -rf "$folder"; [ -z "$server" ] || kill "$server" 2>/dev/null || true' EXIT
cd "$folder"
"$van_deploy" doctor > doctor.txt
"$van_deploy" export van_digits --output digits > export.txt
"$van_deploy" quantize digits --precision fp16 > fp16.txt
"$van_deploy" verify digits > verify.txt
"$van_deploy" predict digits digits/golden/0.png
"$van_deploy" report digits > report.txt
openssl genpkey -algorithm ed25519 -out key.pem
openssl pkey -in key.pem -pubout -out key.pem.pub
"$van_deploy" sign digits --key key.pem > sign.txt
"$van_deploy" verify-signature digits --public-key key.pem.pub
"$van_deploy" serve digits --port 0 --json > serve.txt &
server=$!
for _ in $(seq 120); do grep -q '}' serve.txt && break; sleep 0.5; done
url="$(sed -n 's/.*"url": "\([^"]*\)".*/\1/p' serve.txt)"
"$(dirname "$van_deploy")/python" - "$url" <<'PYTHON'
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1].rstrip("/") + "/v2/health/ready", timeout=10) as answer:
    assert answer.status == 200
print("the server is ready")
PYTHON
kill -INT "$server"
wait "$server" || [ $? -eq 130 ]
server=""
echo "smoke: everything worked"
