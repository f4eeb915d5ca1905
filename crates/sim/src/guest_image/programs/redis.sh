#!/bin/sh
# A store of 50,000 sessions, about 20 MB, that a client changes one after the other; each change prints a line.
redis-server --bind 127.0.0.1 --save '' --dir /tmp >/dev/null &
until redis-cli ping >/dev/null 2>&1; do sleep 1; done
redis-cli eval "for id = 0, 49999 do
    local token = redis.sha1hex(id)
    redis.call('SET', 'session:' .. id, 'user=' .. id .. ';cart=0;token=' .. token .. redis.sha1hex(token) .. token)
end" 0 >/dev/null
awk 'BEGIN {
    for (;;) {
        id = int(rand() * 50000)
        token = int(rand() * 1000000000) "-" int(rand() * 1000000000)
        printf "SET session:%d user=%d;cart=%d;token=%s\n", id, id, rand() * 100, token token token token token
    }
}' | redis-cli
