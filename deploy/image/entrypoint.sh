#!/bin/sh
# Runs the datasync command. The suite (`up`, the default of the image datasync) needs API_KEY and DB_URL.
# SETTINGS_FILE: a file with settings as NAME=value lines, for secrets that should not be in the container's definition.
set -eu
if [ -n "${SETTINGS_FILE:-}" ]; then
    while IFS= read -r setting || [ -n "$setting" ]; do
        case $setting in ?*=*) export "$setting" ;; esac
    done < "$SETTINGS_FILE"
fi
if [ "${1:-}" = up ]; then
    missing=
    [ -n "${API_KEY:-}" ] || missing="$missing API_KEY"
    [ -n "${DB_URL:-}" ] || missing="$missing DB_URL"
    if [ -n "$missing" ]; then
        echo "datasync: required environment variables are not set:$missing" >&2
        echo "  docker run -p 8080:8080 -v datasync:/var/lib/datasync -e API_KEY=<at least 8 characters>" \
            "-e DB_URL=postgresql://user:password@host:5432/database datasync" >&2
        exit 2
    fi
    echo "datasync: databases, keys and logs are in $DATA_DIR: keep it in a volume" >&2
fi
exec /opt/datasync/bin/datasync "$@"
