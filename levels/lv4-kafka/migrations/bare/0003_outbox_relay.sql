-- Which events were relayed to Kafka: one row, written by relays only. It contains every number that was acknowledged, or that no event
-- will ever have. An event may be deleted from the outbox once this row contains its number and no buyer will ask for it any more.
--
-- Ranges and not the last number: numbers become visible in the order of the commits. A transaction that draws 7 may commit after one that
-- draws 8, and one that is rolled back leaves a permanent gap.
create table outbox_relay (
    relayed int8multirange not null
);
insert into outbox_relay
    values ('{(,0]}');
