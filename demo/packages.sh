#!/usr/bin/env bash
# packages.sh demo|openstack|test   Installs the Debian packages that a step needs and that are missing.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
demo="cryptsetup-bin openssl fuse3"
openstack="$demo python3-keystone python3-barbican python3-barbicanclient uwsgi-core uwsgi-plugin-python3 curl jq qemu-utils e2fsprogs util-linux"
test="$openstack qemu-system-x86 busybox-static kmod xz-utils fio nbdkit libnbd-bin groff-base dmsetup cryptsetup udev debian-archive-keyring debootstrap python3-cryptography qemu-user-static"
wanted=${!1:?usage: packages.sh demo|openstack|test}
missing=
for package in $wanted; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=" $package"
done
[ -n "$missing" ] || exit 0
echo "installing:$missing"
here=$(dirname "$0")
apt() { "$here/as-root.sh" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold -q "$@"; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A fresh machine has no package lists; an old one may have stale ones.
# shellcheck disable=SC2086
apt install -y --no-install-recommends $missing >"$log" 2>&1 ||
  { apt update >"$log" 2>&1 && apt install -y --no-install-recommends $missing >"$log" 2>&1; } ||
  { tail -n 30 "$log" >&2; exit 1; }
