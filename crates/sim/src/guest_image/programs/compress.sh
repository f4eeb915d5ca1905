#!/bin/sh
# An archive of the system's own files is compressed, again and again; every 32 KB that went in print a line.
cat /bin/busybox /modules/* /lib/x86_64-linux-gnu/* >/tmp/plain
pieces=$(($(stat -c %s /tmp/plain) / 32768))
exec 3>&1
for piece in $(seq 0 $pieces); do
    dd if=/tmp/plain bs=32k skip="$piece" count=1 2>/dev/null
    echo >&3
done | /usr/bin/xz -6 >/tmp/packed.xz
