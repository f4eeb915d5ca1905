#!/bin/sh
# A database of 40,000 accounts, about 20 MB, with a write-ahead log. Transaction follows transaction, each of five
# changed rows and a new one; each prints a line.
rm -f /tmp/bank*
awk 'BEGIN {
    print ".output /dev/null"
    print "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
    print "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT);"
    print "CREATE TABLE booking (id INTEGER PRIMARY KEY, account INTEGER, amount INTEGER);"
    print "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < 40000)"
    print "INSERT INTO account SELECT id, 0, hex(randomblob(200)) FROM n;"
    print ".output"
    for (;;) {
        transaction = "BEGIN;"
        for (row = 0; row < 5; row++) {
            account = 1 + int(rand() * 40000)
            amount = int(rand() * 1000)
            transaction = transaction " UPDATE account SET balance = balance + " amount \
                ", note = hex(randomblob(200)) WHERE id = " account ";"
        }
        print transaction " INSERT INTO booking (account, amount) VALUES (" account ", " amount "); COMMIT; SELECT 1;"
    }
}' | sqlite3 -batch -bail /tmp/bank
