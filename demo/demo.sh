#!/usr/bin/env bash
# The main job, start to end: a LUKS2 volume made by cryptsetup opens with a key from the embedded cluster-kms, data goes
# through it, and it is closed. Everything happens in a temporary directory; nothing of it is left.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
umask 077
dir=$(mktemp -d)
voldekd=
finish() {
  if [ -n "$voldekd" ]; then kill "$voldekd" 2>/dev/null || true; wait "$voldekd" 2>/dev/null || true; fi
  rm -rf "$dir"
}
trap finish EXIT
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
voldek() { printf '$ voldek %s\n' "$*"; bin/voldek --socket "$dir/voldek.sock" "$@"; }

say "1. A cluster-kms: a master key and a salt, in two files of mode 0600"
openssl rand 32 | basenc --base64url >"$dir/master-key"
openssl rand 32 | basenc --base64url >"$dir/salt"
cat >"$dir/voldek.toml" <<TOML
[daemon]
run_dir = "$dir/run"

[service.cluster]
type = "kms"
kms = "kms://cluster-kms?keyFile=$dir/master-key&saltFile=$dir/salt"
storage = "storage://no-store"
TOML
cat "$dir/voldek.toml"

say "2. A LUKS2 volume, made by cryptsetup; its key is derived from the volume's UUID (HKDF-SHA256, here by openssl)"
uuid=$(cat /proc/sys/kernel/random/uuid)
hex() { basenc -d --base64url "$1" | od -An -v -tx1 | tr -d ' \n'; }
truncate -s 64M "$dir/volume.img"
openssl kdf -keylen 32 -kdfopt digest:SHA2-256 -kdfopt "hexkey:$(hex "$dir/master-key")" \
  -kdfopt "hexsalt:$(hex "$dir/salt")" -kdfopt "info:key-$uuid" -binary HKDF |
  cryptsetup luksFormat --batch-mode --type luks2 --uuid "$uuid" --key-file=- --pbkdf-memory 65536 --disable-locks "$dir/volume.img"
run bin/voldek inspect "$dir/volume.img"

say "3. The daemon"
bin/voldekd --config "$dir/voldek.toml" --socket "$dir/voldek.sock" 2>"$dir/log" &
voldekd=$!
until [ -S "$dir/voldek.sock" ]; do
  kill -0 "$voldekd" || { cat "$dir/log"; exit 1; }
  sleep 0.05
done

say "4. Attach: the key is fetched, proven, used and wiped"
voldek attach "$dir/volume.img" --key kms:cluster --name demo --via fuse
volume=$dir/run/fuse/demo/volume
voldek list
voldek status demo

say "5. Write through the volume and read back"
{ yes "a canary sings in the plaintext" || true; } | head -c 4M >"$dir/data"
run dd if="$dir/data" of="$volume" bs=1M conv=notrunc,fsync status=none
run cmp -n 4194304 "$dir/data" "$volume" && echo "the volume reads as written"
if grep -qaF canary "$dir/volume.img"; then echo "plaintext was found in the image" >&2; exit 1; fi
echo "the image holds no plaintext"

say "6. Detach, and read once more without the daemon"
voldek detach demo
voldek list
bin/voldek --config "$dir/voldek.toml" cat "$dir/volume.img" --key kms:cluster --length 4194304 | cmp - "$dir/data"
echo "voldek cat reads as written"
say "Done: the same works with --key barbican:UUID (make demo-openstack)."
