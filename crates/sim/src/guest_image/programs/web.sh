#!/bin/sh
# 256 pages of 32 KB, and 32 MB of pictures that nobody asks for; each answer prints a line.
mkdir -p /tmp/pages /var/lib/nginx
cd /tmp/pages || exit
if ! [ -e pictures ]; then
    for page in $(seq 0 255); do head -c 24576 /dev/urandom | base64 >"$page"; done
    head -c 33554432 /dev/urandom >pictures
fi
exec nginx -e stderr -c /programs/nginx.conf
