#!/bin/bash
# Runs mongod as the only member of a replica set: initiates the set and creates the user on the first start.
# Needs MONGODB_USERNAME, MONGODB_PASSWORD or MONGODB_PASSWORD_FILE, MONGODB_HOST (how clients reach this member),
# MONGODB_CACHE_GB, and the key file's text at MONGODB_KEY_FILE.
set -euo pipefail
# mongod accepts a key file only if nobody else can read it.
install -m 400 "$MONGODB_KEY_FILE" /tmp/keyfile
[ -z "${MONGODB_PASSWORD_FILE:-}" ] || MONGODB_PASSWORD=$(cat "$MONGODB_PASSWORD_FILE")
export MONGODB_PASSWORD
# A member that can't find itself under its name when it starts stays without a valid configuration. The name may still
# be unknown, or be that of the container before.
until getent hosts "${MONGODB_HOST%:*}" | cut -d' ' -f1 | grep -qxF "$(hostname -i | cut -d' ' -f1)"; do
    sleep 0.5
done
mongod --dbpath /data/db --bind_ip_all --port 27017 --replSet datasync --keyFile /tmp/keyfile --nounixsocket \
    --wiredTigerCacheSizeGB "$MONGODB_CACHE_GB" --setParameter transactionLifetimeLimitSeconds=15 &
mongod=$!
trap 'kill -TERM "$mongod"' TERM INT

# Until the user exists, mongod lets a client on its own host create it.
mongosh --quiet --nodb --eval '
const name = process.env.MONGODB_USERNAME, password = process.env.MONGODB_PASSWORD;
const address = "mongodb://127.0.0.1:27017/admin?directConnection=true";
let db;
for (let attempt = 1; ; attempt++) {
  try { db = connect(address); break; } catch (error) { if (attempt === 240) throw error; sleep(250); }
}
try {
  rs.initiate({_id: "datasync", members: [{_id: 0, host: process.env.MONGODB_HOST}]});
} catch (error) {
  if (!["AlreadyInitialized", "Unauthorized"].includes(error.codeName)) throw error;
}
while (!db.hello().isWritablePrimary) sleep(100);
try {
  db.createUser({user: name, pwd: password, roles: ["root"]});
} catch (error) {
  if (!["Unauthorized", "Location51003"].includes(error.codeName)) throw error;
}
if (!db.auth(name, password)) throw new Error("the password is not that of the user in the database");
' &
set_up=$!

# The container ends with mongod, also during the set-up, and with a set-up that failed.
status=0
wait -n "$mongod" "$set_up" || status=$?
kill -0 "$mongod" 2> /dev/null || exit "$status"
[ "$status" = 0 ] || kill -TERM "$mongod"
while kill -0 "$mongod" 2> /dev/null; do
    status=0
    wait "$mongod" || status=$?
done
exit "$status"
