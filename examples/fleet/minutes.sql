-- One row per minute, host, process name, role, server's port and end, filled from what is inserted into tcplife; kept
-- for a year. To store nothing else, create the table tcplife with ENGINE = Null in place of its last two lines.

CREATE MATERIALIZED VIEW IF NOT EXISTS tcplife_minutes
ENGINE = SummingMergeTree PARTITION BY toYYYYMM(minute) ORDER BY (host, comm, role, port, end, minute)
TTL minute + INTERVAL 1 YEAR
AS SELECT
    host, toStartOfMinute(toDateTime(toUInt32(ts))) AS minute, ifNull(comm, '') AS comm, ifNull(role, '') AS role,
    if(role = 'accept', lport, rport) AS port, ifNull(end, '') AS end,
    count() AS n, sum(tx_bytes) AS tx, sum(rx_bytes) AS rx, sum(retrans) AS retransmits, sum(ms) AS total_ms,
    countIf(ms > 10) AS over_10ms, countIf(ms > 100) AS over_100ms, countIf(ms > 1000) AS over_1s
FROM tcplife GROUP BY host, minute, comm, role, port, end;
