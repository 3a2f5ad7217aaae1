-- Orders that are decided before the others: ORDER_PRIORITY.

-- The buyers whom the admin has named as VIPs of a sale.
create table vip (
    sale_id  bigint not null,
    buyer_id bigint not null,
    primary key (sale_id, buyer_id)
);

-- ANCHOR: decision
-- The place in Kafka of each order that was decided, in the order of the decisions. Written with priority only: without it, the offsets of
-- the one topic are that order.
create table decision (
    number         bigint generated always as identity primary key,
    reservation_id uuid    not null,
    topic          text    not null,
    partition      integer not null,
    log_offset     bigint  not null
);
-- ANCHOR_END: decision

-- What the judge reads, beside the two views that every level has.
create view decision_now as
    select number, reservation_id, topic, partition, log_offset
      from decision;
