#!/bin/sh
# The system's own files are compressed, again and again, in pieces of 32 KB and in an order that has any few seconds see
# the same mix of them: some take three times as long as others. Each piece that went in prints a line.
cat /bin/busybox /modules/* /lib/x86_64-linux-gnu/* >/tmp/plain
pieces=$(($(stat -c %s /tmp/plain) / 32768))
exec 3>&1
for piece in $(seq 1 $pieces); do
    dd if=/tmp/plain bs=32k skip=$((piece * 101 % pieces)) count=1 2>/dev/null
    echo >&3
done | /usr/bin/xz -6 >/tmp/packed.xz
