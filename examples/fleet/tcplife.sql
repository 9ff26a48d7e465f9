-- The table for the JSON lines of tcplife and one for its messages, kept for 14 days; and one for the sessions that -i
-- lists as open, where the last line of a session replaces those before it. The user in tcplife.conf may only insert:
--     CREATE USER tcplife IDENTIFIED BY '...'
--     GRANT INSERT ON default.* TO tcplife
-- (18.16 has users.xml for that.)
--
-- ClickHouse before 19.6 (Debian 12 has 18.16) knows neither LowCardinality nor TTL:
--     sed 's/LowCardinality(\(.*\)),/\1,/; /^TTL/d' tcplife.sql | clickhouse-client -n
-- It keeps everything until you drop a day: ALTER TABLE tcplife DROP PARTITION '2026-11-25'

CREATE TABLE IF NOT EXISTS tcplife (
    host LowCardinality(String),                -- added by the collector
    ts Float64,                                 -- end of the session, Unix seconds
    time DateTime ALIAS toDateTime(toUInt32(ts)),
    pid Nullable(UInt32),
    comm LowCardinality(Nullable(String)),
    comm_hex String,
    ip UInt8,
    laddr String,
    lport UInt16,
    raddr String,
    rport UInt16,
    tx_bytes UInt64,
    rx_bytes UInt64,
    ms Float64,
    netns UInt32,
    role LowCardinality(Nullable(String)),
    end LowCardinality(Nullable(String)),
    err LowCardinality(Nullable(String)),
    connect_ms Nullable(Float64),
    accept_ms Nullable(Float64),
    srtt_us Nullable(UInt32),
    retrans UInt32,
    partial UInt8
) ENGINE = MergeTree PARTITION BY toDate(toUInt32(ts)) ORDER BY (host, lport, ts)
TTL toDateTime(toUInt32(ts)) + INTERVAL 14 DAY
;

CREATE TABLE IF NOT EXISTS tcplife_open AS tcplife
ENGINE = ReplacingMergeTree PARTITION BY toDate(toUInt32(ts)) ORDER BY (host, netns, laddr, lport, raddr, rport)
TTL toDateTime(toUInt32(ts)) + INTERVAL 1 DAY
;

CREATE TABLE IF NOT EXISTS tcplife_messages (
    host LowCardinality(String),
    time DateTime,
    message String
) ENGINE = MergeTree PARTITION BY toDate(time) ORDER BY (host, time)
TTL time + INTERVAL 14 DAY
;
