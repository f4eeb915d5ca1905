#!/bin/sh
# Runs in the guest, off its disk. Each file that it writes is named after its content, and told of once both are synced.
md5sum -c -s /checked.md5 || exec sleep 99999
mkdir -p /files
I=0
while true; do
    I=$((I + 1))
    dd if=/dev/urandom of=/files/new bs=64k count=1 conv=fsync 2>/dev/null
    SUM=$(md5sum /files/new)
    mv /files/new "/files/${SUM%% *}"
    sync
    echo $I
done
