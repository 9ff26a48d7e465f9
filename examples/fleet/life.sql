-- For chDB: the file life.json under the name that the queries use, and no messages.
CREATE VIEW tcplife AS
    SELECT 'here' AS host, *, toDateTime(toUInt32(ts)) AS time FROM file('life.json', JSONEachRow)
    WHERE ifNull(end, '') != 'open';
CREATE VIEW tcplife_messages AS SELECT 'here' AS host, now() AS time, '' AS message WHERE 0;
