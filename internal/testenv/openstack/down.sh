#!/bin/bash
#   DATA=DIR [PURGE=1] ./down.sh
#
# Stops only what up.sh started, by its recorded pids. PURGE=1 also removes DATA.
: "${DATA:?set DATA to the directory given to up.sh}"
for n in barbican keystone; do
  f="$DATA/run/$n.pid"; [ -s "$f" ] || continue
  p=$(cat "$f")
  # is the pid still our uwsgi? (guards against pid reuse)
  if [ -r "/proc/$p/cmdline" ] && tr '\0' ' ' <"/proc/$p/cmdline" | grep -qF -- "--pidfile $f"; then
    kill -TERM "$p"; for _ in $(seq 1 50); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done
    kill -0 "$p" 2>/dev/null && kill -KILL "$p"
  fi
  rm -f "$f"
done
if [ "${PURGE:-0}" = 1 ] && [ -f "$DATA/keystone.conf" ] && [ -f "$DATA/barbican_wsgi.py" ]; then rm -rf "$DATA"; fi
exit 0
