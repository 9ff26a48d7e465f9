-- On each server, after tcplife.sql: the database "fleet", in which a table is that of all shards together.
CREATE DATABASE IF NOT EXISTS fleet;
CREATE TABLE IF NOT EXISTS fleet.tcplife AS default.tcplife ENGINE = Distributed(fleet, default, tcplife);
CREATE TABLE IF NOT EXISTS fleet.tcplife_open AS default.tcplife_open
    ENGINE = Distributed(fleet, default, tcplife_open);
CREATE TABLE IF NOT EXISTS fleet.tcplife_messages AS default.tcplife_messages
    ENGINE = Distributed(fleet, default, tcplife_messages);
