#!/bin/sh
# Fills in the variables NGINX_… of the templates, then becomes the command.
set -eu

for template in "${NGINX_ENVSUBST_TEMPLATE_DIR:=/etc/nginx/templates}"/*.template; do
    [ -e "$template" ] || continue
    name=${template##*/}
    variables=$(env | sed -n 's/^\(NGINX_[A-Z_]*\)=.*/${\1}/p')
    envsubst "$variables" <"$template" >"${NGINX_ENVSUBST_OUTPUT_DIR:=/etc/nginx/conf.d}/${name%.template}"
done
exec "$@"
