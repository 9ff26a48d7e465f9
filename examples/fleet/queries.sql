-- The seven questions, of the last hour. With other questions, start from these.

-- 1: which port became slow, and when: the minutes whose median is furthest above that of the hour; accept_ms of it
-- was spent in the accept queue, and a round trip took rtt_ms
SELECT minute, host, lport, n, round(p50, 1) AS p50_ms, round(usual, 1) AS usual_ms,
       round(queue, 1) AS accept_ms, round(srtt / 1000, 2) AS rtt_ms
FROM (
    SELECT toStartOfMinute(time) AS minute, host, lport, count() AS n, quantile(0.5)(ms) AS p50,
           quantile(0.5)(accept_ms) AS queue, quantile(0.5)(srtt_us) AS srtt
    FROM tcplife WHERE role = 'accept' AND ts > toUnixTimestamp(now()) - 3600
    GROUP BY minute, host, lport HAVING n >= 10
) AS minutes ALL INNER JOIN (
    SELECT host, lport, quantile(0.5)(ms) AS usual
    FROM tcplife WHERE role = 'accept' AND ts > toUnixTimestamp(now()) - 3600 GROUP BY host, lport
) AS hour USING host, lport
ORDER BY p50 / usual DESC, minute, host, lport LIMIT 5;

-- 2: who cannot connect, and how it failed
SELECT host, comm, raddr, rport, end, err, count() AS n, round(avg(ms), 1) AS avg_ms, max(time) AS last
FROM tcplife WHERE role = 'connect' AND connect_ms IS NULL AND ts > toUnixTimestamp(now()) - 3600
GROUP BY host, comm, raddr, rport, end, err ORDER BY n DESC, host, comm, raddr, rport LIMIT 5;

-- 3: who moves the bytes
SELECT host, comm, role, count() AS n, sum(tx_bytes) AS tx, sum(rx_bytes) AS rx
FROM tcplife WHERE ts > toUnixTimestamp(now()) - 3600
GROUP BY host, comm, role ORDER BY tx + rx DESC, host, comm LIMIT 5;

-- 4: who churns: many short sessions, by caller and target
SELECT host, comm, raddr, rport, count() AS n, round(n / 60, 2) AS per_min, round(quantile(0.5)(ms), 1) AS p50_ms
FROM tcplife WHERE role = 'connect' AND connect_ms IS NOT NULL AND ts > toUnixTimestamp(now()) - 3600
GROUP BY host, comm, raddr, rport ORDER BY n DESC, host, comm, raddr, rport LIMIT 5;

-- 5: what did this peer do
SELECT time, host, comm, pid, lport, rport, tx_bytes, rx_bytes, round(ms, 1) AS ms, end, err, retrans
FROM tcplife WHERE raddr = '10.30.0.32' AND ts > toUnixTimestamp(now()) - 3600 ORDER BY ts DESC LIMIT 10;

-- 6: which machine has gone quiet
SELECT host, count() AS n, max(time) AS last
FROM tcplife WHERE ts > toUnixTimestamp(now()) - 86400 GROUP BY host ORDER BY last, host LIMIT 5;

-- 7: what is missing from all this: what tcplife reported as lost, and why it did not run
SELECT host, count() AS n, max(time) AS last, sum(toUInt64OrZero(extract(message, '^tcplife: (\\d+) '))) AS lost,
       replaceRegexpOne(message, '^tcplife: (in all )?\\d+ ', '') AS what
FROM tcplife_messages WHERE time > now() - 86400 AND message NOT LIKE 'tcplife: in all %'
GROUP BY host, what ORDER BY last DESC, host, what LIMIT 5;
