#!/usr/bin/env bash
# The main job with a real Keystone and Barbican on loopback: Barbican makes the keys, volumes are formatted with the very
# command lines of os-brick, data goes through voldek, and readers that are not ours find it there. Everything happens in
# a temporary directory; nothing of it is left.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
umask 077
dir=$(mktemp -d)
openstack=internal/testenv/openstack
voldekd=
finish() {
  if [ -n "$voldekd" ]; then kill "$voldekd" 2>/dev/null || true; wait "$voldekd" 2>/dev/null || true; fi
  DATA=$dir/openstack PURGE=1 $openstack/down.sh
  rm -rf "$dir"
}
trap finish EXIT
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
voldek() { printf '$ voldek %s\n' "$*"; bin/voldek --socket "$dir/voldek.sock" "$@"; }
hex() { od -An -v -tx1 "$1" | tr -d ' \n'; }

say "1. A real Keystone and Barbican, over TLS with a CA of their own"
free_ports='import socket; s = [socket.socket() for _ in "kb"]; [x.bind(("127.0.0.1", 0)) for x in s]; print(*[x.getsockname()[1] for x in s])'
read -r KEYSTONE_PORT BARBICAN_PORT < <(/usr/bin/python3 -c "$free_ports")
export KEYSTONE_PORT BARBICAN_PORT
DATA=$dir/openstack TLS=1 $openstack/up.sh
# shellcheck disable=SC1091
. "$dir/openstack/env"
ask() { curl -sS --fail --max-time 30 --cacert "$OS_CACERT" -H "X-Auth-Token: ${token:-}" "$@"; }
token=$(ask -H 'Content-Type: application/json' -D - -o /dev/null "$OS_AUTH_URL/auth/tokens" -d @- <<JSON |
{"auth": {"identity": {"methods": ["password"], "password": {"user": {"name": "$IT_USER", "domain": {"id": "default"},
 "password": "$IT_PASSWORD"}}}, "scope": {"project": {"id": "$IT_PROJECT_ID"}}}}
JSON
  tr -d '\r' | awk 'tolower($1) == "x-subject-token:" { print $2 }')

# order_key FILE: Barbican makes a key, as for Cinder; its bytes go into FILE and its UUID to stdout.
order_key() {
  local order secret
  order=$(ask -H 'Content-Type: application/json' "$IT_BARBICAN/v1/orders" \
    -d '{"type": "key", "meta": {"algorithm": "AES", "bit_length": 256}}' | jq -r .order_ref)
  secret=$(ask "$order" | jq -r .secret_ref)
  ask -H 'Accept: application/octet-stream' -o "$1" "$secret/payload"
  echo "${secret##*/}"
}

say "2. Two keys ordered from Barbican, and two volumes as os-brick formats them: luks1 and luks2"
for type in luks1 luks2; do
  order_key "$dir/$type.key" >"$dir/$type.uuid"
  hex "$dir/$type.key" >"$dir/$type.passphrase" # what Nova, Cinder and os-brick make of a key
  echo "$type: barbican:$(cat "$dir/$type.uuid")"
  truncate -s 80M "$dir/$type.img"
  run cryptsetup --batch-mode luksFormat --type $type --key-file=- --cipher aes-xts-plain64 --key-size 256 \
    "$dir/$type.img" <"$dir/$type.passphrase"
done

say "3. The daemon, which logs in as the user whose password lies in a file of mode 0600"
printf '%s\n' "$IT_PASSWORD" >"$dir/password"
cat >"$dir/voldek.toml" <<TOML
[daemon]
run_dir = "$dir/run"

[service.os]
type = "barbican"
default = true
auth_url = "$OS_AUTH_URL"
username = "$IT_USER"
project = "it-project"
password = "file:$dir/password"
region = "$OS_REGION_NAME"
ca_file = "$OS_CACERT"
TOML
cat "$dir/voldek.toml"
bin/voldekd --config "$dir/voldek.toml" --socket "$dir/voldek.sock" 2>"$dir/log" &
voldekd=$!
until [ -S "$dir/voldek.sock" ]; do
  kill -0 "$voldekd" || { cat "$dir/log"; exit 1; }
  sleep 0.05
done

say "4. Attach by the secret's UUID, and write a file system with a file into each volume"
mkdir "$dir/tree"
{ yes "a canary sings in the plaintext" || true; } | head -c 1M >"$dir/tree/song"
head -c 4M /dev/urandom >"$dir/tree/noise"
for type in luks1 luks2; do
  voldek attach "$dir/$type.img" --key "barbican:$(cat "$dir/$type.uuid")" --name "demo-$type" --via fuse
  volume=$(bin/voldek --socket "$dir/voldek.sock" --json status "demo-$type" | jq -r .volume.export)
  run mke2fs -q -F -t ext4 -d "$dir/tree" "$volume"
  sha256sum <"$volume" >"$dir/$type.sha256"
done
voldek list

say "5. A key that is not there and a service that is down are told apart; what is open stays open"
wants() { # CODE COMMAND...
  local want=$1 code=0; shift
  "$@" || code=$?
  echo "exit code $code"
  [ "$code" = "$want" ]
}
voldek detach demo-luks2
wants 13 voldek attach "$dir/luks2.img" --key barbican:11111111-2222-4333-8444-555555555555 --name other --via fuse
DATA=$dir/openstack $openstack/down.sh
wants 15 voldek attach "$dir/luks2.img" --key "barbican:$(cat "$dir/luks2.uuid")" --name other --via fuse --timeout 3s
sha256sum <"$dir/run/fuse/demo-luks1/volume" | cmp - "$dir/luks1.sha256"
echo "demo-luks1 reads as written while Barbican is down"

say "6. Detach"
voldek detach demo-luks1
voldek list
if grep -qaF canary "$dir"/luks?.img; then echo "plaintext was found in an image" >&2; exit 1; fi
echo "the images hold no plaintext"

# check TYPE READER: the plaintext that READER made is what was written through voldek, and the file system is whole.
check() {
  sha256sum <"$dir/$1.plain" | cmp - "$dir/$1.sha256"
  e2fsck -fn "$dir/$1.plain" >/dev/null 2>&1
  debugfs -R "cat /song" "$dir/$1.plain" 2>/dev/null | cmp - "$dir/tree/song"
  debugfs -R "cat /noise" "$dir/$1.plain" 2>/dev/null | cmp - "$dir/tree/noise"
  echo "$1: $2 reads the same $(stat -c %s "$dir/$1.plain") bytes, and e2fsck finds no fault"
}

say "7. Read by others: LUKS1 by qemu-img"
run qemu-img convert -O raw --object "secret,id=key,file=$dir/luks1.passphrase" \
  --image-opts "driver=luks,key-secret=key,file.filename=$dir/luks1.img" "$dir/luks1.plain"
check luks1 qemu-img

say "8. LUKS2 by cryptsetup's offline decryption, of a copy whose header is put aside"
# It decrypts in place, and only below a header that lies elsewhere with its data at 0: so a header with the same volume
# key is made for the bare data.
img=$dir/luks2.img
cryptsetup luksDump --batch-mode --dump-volume-key --volume-key-file "$dir/volume-key" \
  --key-file "$dir/luks2.passphrase" "$img" >/dev/null
metadata=$(cryptsetup luksDump --dump-json-metadata "$img")
offset=$(jq -r '.segments["0"].offset' <<<"$metadata")
dd if="$img" of="$dir/luks2.plain" bs=1M iflag=skip_bytes skip="$offset" status=none
truncate -s 16M "$dir/header"
cryptsetup luksFormat --batch-mode --type luks2 --header "$dir/header" --offset 0 --volume-key-file "$dir/volume-key" \
  --cipher aes-xts-plain64 --key-size 256 --sector-size "$(jq -r '.segments["0"].sector_size' <<<"$metadata")" \
  --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --disable-locks --key-file "$dir/luks2.passphrase" "$dir/luks2.plain"
run cryptsetup reencrypt --decrypt --force-offline-reencrypt --resilience none --disable-locks --batch-mode \
  --header "$dir/header" --key-file "$dir/luks2.passphrase" "$dir/luks2.plain"
check luks2 cryptsetup
say "Done: keys ordered from Barbican, volumes formatted as os-brick does, written by voldek, read by others."
