#!/bin/bash
# Starts a real Keystone and a real Barbican (Debian's packages, sqlite, uwsgi) on 127.0.0.1: no daemon packages, no
# containers.
#
#   DATA=DIR [KEYSTONE_PORT=5000] [BARBICAN_PORT=9311] [TOKEN_TTL=3600] [TLS=1] ./up.sh
#
# Idempotent. Writes $DATA/env (shell exports); pids lie in $DATA/run/*.pid, logs in $DATA/log. A kept DATA starts in
# seconds, and must be given the same ports and TLS setting again, since the catalogue holds them. Root is needed only
# where packages are missing. Stop with: DATA=DIR ./down.sh
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin          # the distribution's python, never one from pyenv or a venv
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV http_proxy https_proxy HTTP_PROXY HTTPS_PROXY || true
: "${DATA:?set DATA to an absolute directory path}"
case $DATA in /*) ;; *) echo "DATA must be absolute" >&2; exit 2;; esac
KP=${KEYSTONE_PORT:-5000}
BP=${BARBICAN_PORT:-9311}
TTL=${TOKEN_TTL:-3600}
TLS=${TLS:-1}
ADMIN_PW=${ADMIN_PW:-admin-pw}
SVC_PW=${SVC_PW:-barbican-svc-pw}
USER_PW=${USER_PW:-creator-pw}
T0=$(date +%s.%N)
lap() { awk -v a="$(date +%s.%N)" -v b="$T0" -v n="$1" 'BEGIN { printf "openstack: %-24s %5.1f s\n", n, a-b }'; }
(umask 077; mkdir -p "$DATA"/{run,log,fernet-keys,credential-keys,bhome/.barbican,khome,keystone-policy.d})

# packages (no daemon packages: nothing auto-starts, no debconf prompts)
PKGS="python3-keystone python3-barbican python3-barbicanclient uwsgi-core uwsgi-plugin-python3 curl jq openssl"
need=0; for p in $PKGS; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || need=1; done
if [ $need = 1 ]; then
  echo "openstack: installing $PKGS (some minutes)"
  export DEBIAN_FRONTEND=noninteractive
  APT="apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold -y -q"
  $APT install --no-install-recommends $PKGS >"$DATA/log/apt.log" 2>&1 \
    || { apt-get update -q >/dev/null; $APT install --no-install-recommends $PKGS >"$DATA/log/apt.log" 2>&1; } \
    || { tail -20 "$DATA/log/apt.log"; exit 1; }
fi
lap "packages"

# config
umask 077      # not earlier: apt must not inherit it
SCHEME=http; SOCK=http-socket; SSLARG=""
CURL="curl -sS --max-time 30"; CAFILE=""
if [ "$TLS" = 1 ]; then
  SCHEME=https; SOCK=https-socket
  if [ ! -f "$DATA/tls.crt" ]; then
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=voldek-test-ca -keyout "$DATA/ca.key" -out "$DATA/ca.crt" 2>/dev/null
    openssl req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout "$DATA/tls.key" -out "$DATA/tls.csr" 2>/dev/null
    printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\n' > "$DATA/san"
    openssl x509 -req -in "$DATA/tls.csr" -CA "$DATA/ca.crt" -CAkey "$DATA/ca.key" -CAcreateserial -days 3650 -extfile "$DATA/san" -out "$DATA/tls.crt" 2>/dev/null
  fi
  SSLARG=",$DATA/tls.crt,$DATA/tls.key"; CAFILE="$DATA/ca.crt"; CURL="$CURL --cacert $CAFILE"
fi
KURL=$SCHEME://127.0.0.1:$KP; BURL=$SCHEME://127.0.0.1:$BP
[ -f "$DATA/kek" ] || openssl rand -base64 32 | tr -d '\n' > "$DATA/kek"

cat > "$DATA/keystone.conf" <<C
[DEFAULT]
log_file = $DATA/log/keystone.log
public_endpoint = $KURL
[database]
connection = sqlite:///$DATA/keystone.db
sqlite_synchronous = false
[token]
provider = fernet
expiration = $TTL
allow_expired_window = 0
[fernet_tokens]
key_repository = $DATA/fernet-keys
[credential]
key_repository = $DATA/credential-keys
[identity]
password_hash_rounds = 4
[role]
# The memory cache hands out the role itself, and Keystone 27 adds links to it that its own response check refuses.
caching = false
[cache]
enabled = true
backend = dogpile.cache.memory
expiration_time = 5
[oslo_policy]
policy_dirs = $DATA/keystone-policy.d
C
cat > "$DATA/bhome/.barbican/barbican.conf" <<C
[DEFAULT]
log_file = $DATA/log/barbican.log
host_href = $BURL
# Zed (15.x) reads [DEFAULT]sql_connection; Antelope+ reads [database]connection
sql_connection = sqlite:///$DATA/barbican.db
db_auto_create = False
transport_url = fake://
max_allowed_secret_in_bytes = 20000
max_allowed_request_size_in_bytes = 25000
[database]
connection = sqlite:///$DATA/barbican.db
sqlite_synchronous = false
[queue]
enable = False
[keystone_authtoken]
www_authenticate_uri = $KURL/v3
auth_url = $KURL
auth_type = password
username = barbican
password = $SVC_PW
project_name = service
user_domain_name = Default
project_domain_name = Default
service_token_roles_required = true
token_cache_time = -1
cafile = $CAFILE
[secretstore]
enabled_secretstore_plugins = store_crypto
[crypto]
enabled_crypto_plugins = simple_crypto
[simple_crypto_plugin]
kek = $(cat "$DATA/kek")
C
[ -n "$CAFILE" ] || sed -i '/^cafile = *$/d' "$DATA/bhome/.barbican/barbican.conf"
cat > "$DATA/barbican-api-paste.ini" <<'C'
[composite:main]
use = egg:Paste#urlmap
/: barbican_version
/v1: barbican-api-keystone
[pipeline:barbican_version]
pipeline = cors http_proxy_to_wsgi microversion versionapp
[pipeline:barbican-api-keystone]
pipeline = cors http_proxy_to_wsgi authtoken context microversion apiapp
[app:apiapp]
paste.app_factory = barbican.api.app:create_main_app
[app:versionapp]
paste.app_factory = barbican.api.app:create_version_app
[filter:context]
paste.filter_factory = barbican.api.middleware.context:ContextMiddleware.factory
[filter:microversion]
paste.filter_factory = barbican.api.middleware.microversion:MicroversionMiddleware.factory
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
[filter:cors]
paste.filter_factory = oslo_middleware.cors:filter_factory
oslo_config_project = barbican
[filter:http_proxy_to_wsgi]
paste.filter_factory = oslo_middleware:HTTPProxyToWSGI.factory
C
# the microversion filter exists only in Yoga and later
[ -f /usr/lib/python3/dist-packages/barbican/api/middleware/microversion.py ] || sed -i 's/ microversion / /' "$DATA/barbican-api-paste.ini"
cat > "$DATA/barbican_wsgi.py" <<C
from paste import deploy
application = deploy.loadapp('config:$DATA/barbican-api-paste.ini', name='main')
C
cat > "$DATA/keystone_wsgi.py" <<'C'
from keystone.server import wsgi
application = wsgi.initialize_public_application()
C

UW=$(command -v uwsgi-core || command -v uwsgi)
# NB: uwsgi --http-socket never keeps connections alive but does not say so; without "Connection: close"
# pooled HTTP clients (python requests, Go net/http) get EOF/ECONNRESET on reuse.
# NB: no uwsgi threads: oslo.db + sqlite objects must stay in their creating thread.
start(){ # name port wsgi env...
  local n=$1 port=$2 w=$3; shift 3; local P=1; [ $n = barbican ] && P=2
  if [ -f "$DATA/run/$n.pid" ] && kill -0 "$(cat "$DATA/run/$n.pid")" 2>/dev/null; then return; fi
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "port $port is in use, cannot start $n" >&2; exit 1; fi
  env "$@" setsid "$UW" --plugins-dir /usr/lib/uwsgi/plugins --plugin python3 \
     --$SOCK "127.0.0.1:$port$SSLARG" --wsgi-file "$w" --master --processes "$P" --enable-threads --add-header "Connection: close" \
     --need-app --die-on-term --buffer-size 65535 --pidfile "$DATA/run/$n.pid" </dev/null >"$DATA/log/$n-uwsgi.log" 2>&1 &
}
wait_http(){ local i; for i in $(seq 1 300); do [ "$($CURL -o /dev/null -w '%{http_code}' "$1" 2>/dev/null)" = "$2" ] && return 0; sleep 0.2; done; echo "TIMEOUT waiting for $1"; tail -20 "$DATA"/log/*; return 1; }

wal(){ /usr/bin/python3 -c 'import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute("pragma journal_mode=wal").fetchone()[0])' "$1" >/dev/null; }
# keystone
KENV="OS_KEYSTONE_CONFIG_FILES=$DATA/keystone.conf HOME=$DATA/khome"
KM="env HOME=$DATA/khome keystone-manage --config-file $DATA/keystone.conf"
if [ ! -f "$DATA/.keystone-done" ]; then
  $KM db_sync >"$DATA/log/keystone-manage.log" 2>&1 || { tail "$DATA/log/keystone-manage.log"; exit 1; }
  wal "$DATA/keystone.db"
  lap "keystone db_sync"
  $KM fernet_setup --keystone-user "$(id -un)" --keystone-group "$(id -gn)" >>"$DATA/log/keystone-manage.log" 2>&1
  $KM credential_setup --keystone-user "$(id -un)" --keystone-group "$(id -gn)" >>"$DATA/log/keystone-manage.log" 2>&1
  $KM bootstrap --bootstrap-password "$ADMIN_PW" --bootstrap-username admin --bootstrap-project-name admin \
     --bootstrap-role-name admin --bootstrap-service-name keystone --bootstrap-region-id RegionOne \
     --bootstrap-admin-url "$KURL/v3" --bootstrap-public-url "$KURL/v3" --bootstrap-internal-url "$KURL/v3" >>"$DATA/log/keystone-manage.log" 2>&1 || { tail "$DATA/log/keystone-manage.log"; exit 1; }
  touch "$DATA/.keystone-done"
fi
lap "keystone db+bootstrap"
start keystone "$KP" "$DATA/keystone_wsgi.py" $KENV
wait_http "$KURL/v3" 200
lap "keystone healthy"

# barbican
if [ ! -f "$DATA/.barbican-done" ]; then
  # no config file flag: HOME makes oslo.config find ~/.barbican/barbican.conf
  env HOME="$DATA/bhome" /usr/bin/python3 -c "
import sys; sys.argv=['barbican-db-manage','-d','sqlite:///$DATA/barbican.db','upgrade']
from barbican.cmd.db_manage import main
main()" >"$DATA/log/barbican-db.log" 2>&1 || { tail "$DATA/log/barbican-db.log"; exit 1; }
  wal "$DATA/barbican.db"
  touch "$DATA/.barbican-done"
fi
lap "barbican db"
start barbican "$BP" "$DATA/barbican_wsgi.py" HOME="$DATA/bhome" PYTHONWARNINGS=ignore
# identity objects through the REST API (idempotent)
J='Content-Type: application/json'
TOK=$($CURL -D - -o /dev/null -H "$J" "$KURL/v3/auth/tokens" -d '{"auth":{"identity":{"methods":["password"],"password":{"user":{"name":"admin","domain":{"id":"default"},"password":"'"$ADMIN_PW"'"}}},"scope":{"project":{"name":"admin","domain":{"id":"default"}}}}}' | tr -d '\r' | awk 'tolower($1)=="x-subject-token:"{print $2}')
[ -n "$TOK" ] || { echo "admin login failed"; exit 1; }
api(){ $CURL -H "X-Auth-Token: $TOK" -H "$J" "$@"; }
mk(){ # kind(plural) singular name extra-json  -> id
  local id; id=$(api "$KURL/v3/$1?name=$3" | jq -r ".$1[0].id // empty")
  [ -n "$id" ] || id=$(api "$KURL/v3/$1" -d "{\"$2\":{\"name\":\"$3\"$4}}" | jq -r ".$2.id")
  [ -n "$id" ] && [ "$id" != null ] || { echo "create $1/$3 failed" >&2; exit 1; }
  echo "$id"; }
SVC_PROJ=$(mk projects project service ',"domain_id":"default"')
IT_PROJ=$(mk projects project it-project ',"domain_id":"default"')
OTHER_PROJ=$(mk projects project it-other ',"domain_id":"default"')
R_ADMIN=$(mk roles role admin ''); R_MEMBER=$(mk roles role member ''); R_READER=$(mk roles role reader '')
R_CREATOR=$(mk roles role creator ''); R_OBS=$(mk roles role observer ''); R_AUDIT=$(mk roles role audit '')
R_SVC=$(mk roles role service ''); R_KMSA=$(mk roles role key-manager:service-admin '')
U_BARB=$(mk users user barbican ',"domain_id":"default","password":"'"$SVC_PW"'"')
U_CRE=$(mk users user it-creator ',"domain_id":"default","password":"'"$USER_PW"'"')
U_OBS=$(mk users user it-observer ',"domain_id":"default","password":"'"$USER_PW"'"')
U_OTH=$(mk users user it-otheruser ',"domain_id":"default","password":"'"$USER_PW"'"')
grant(){ api -X PUT "$KURL/v3/projects/$1/users/$2/roles/$3" >/dev/null; }
grant "$SVC_PROJ" "$U_BARB" "$R_ADMIN"; grant "$SVC_PROJ" "$U_BARB" "$R_SVC"
grant "$IT_PROJ" "$U_CRE" "$R_CREATOR"; grant "$IT_PROJ" "$U_CRE" "$R_MEMBER"
grant "$IT_PROJ" "$U_OBS" "$R_OBS"; grant "$OTHER_PROJ" "$U_OTH" "$R_CREATOR"
SVC_ID=$(api "$KURL/v3/services?type=key-manager" | jq -r '.services[0].id // empty')
if [ -z "$SVC_ID" ]; then
  SVC_ID=$(api "$KURL/v3/services" -d '{"service":{"type":"key-manager","name":"barbican"}}' | jq -r .service.id)
  for i in public internal admin; do api "$KURL/v3/endpoints" -d "{\"endpoint\":{\"service_id\":\"$SVC_ID\",\"interface\":\"$i\",\"region_id\":\"RegionOne\",\"url\":\"$BURL\"}}" >/dev/null; done
fi
# application credential: only the user itself can create it
if [ ! -s "$DATA/appcred.json" ]; then
  UT=$($CURL -D - -o /dev/null -H "$J" "$KURL/v3/auth/tokens" -d '{"auth":{"identity":{"methods":["password"],"password":{"user":{"name":"it-creator","domain":{"id":"default"},"password":"'"$USER_PW"'"}}},"scope":{"project":{"id":"'"$IT_PROJ"'"}}}}' | tr -d '\r' | awk 'tolower($1)=="x-subject-token:"{print $2}')
  $CURL -H "X-Auth-Token: $UT" -H "$J" "$KURL/v3/users/$U_CRE/application_credentials" \
    -d '{"application_credential":{"name":"it-appcred","roles":[{"name":"creator"}],"unrestricted":false}}' > "$DATA/appcred.json"
fi
AC_ID=$(jq -r .application_credential.id "$DATA/appcred.json"); AC_SECRET=$(jq -r .application_credential.secret "$DATA/appcred.json")
[ -n "$AC_SECRET" ] && [ "$AC_SECRET" != null ] || { echo "app cred failed"; cat "$DATA/appcred.json"; exit 1; }
lap "identity objects"
wait_http "$BURL/" 300
wait_http "$BURL/v1/secrets" 401
lap "barbican healthy"
cat > "$DATA/env" <<C
export OS_AUTH_URL=$KURL/v3 OS_IDENTITY_API_VERSION=3 OS_REGION_NAME=RegionOne OS_CACERT=$CAFILE
export IT_KEYSTONE=$KURL IT_BARBICAN=$BURL IT_PROJECT_ID=$IT_PROJ IT_OTHER_PROJECT_ID=$OTHER_PROJ IT_USER_ID=$U_CRE
export IT_USER=it-creator IT_PASSWORD=$USER_PW IT_OBSERVER=it-observer IT_OTHER_USER=it-otheruser
export IT_ADMIN_PASSWORD=$ADMIN_PW IT_APPCRED_ID=$AC_ID IT_APPCRED_SECRET=$AC_SECRET
C
lap "ready"
