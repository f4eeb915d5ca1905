#!/bin/sh
# Runs in the guest, off its disk. Each file that it writes is named after its content, and told of once both are synced.
md5sum -c -s /checked.md5 || exec sleep 99999
mkdir -p /work
I=0
while true; do
    I=$((I + 1))
    dd if=/dev/urandom of=/work/new bs=64k count=1 conv=fsync 2>/dev/null
    SUM=$(md5sum /work/new)
    mv /work/new "/work/${SUM%% *}"
    sync
    echo $I
done
