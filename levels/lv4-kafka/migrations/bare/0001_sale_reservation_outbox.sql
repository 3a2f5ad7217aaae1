-- The schema `bare`: tables, and no constraint that could keep a guarantee in a strategy's place.
--
-- Not even the id of a reservation is unique: that an order is decided once is for the strategy to see to.

create table sale (
    id       bigint primary key,
    name     text   not null,
    capacity bigint not null,
    stock    bigint not null
);

-- ANCHOR: tables
-- What was decided, one row for each order: also for those who got no ticket, as their buyers ask as well.
create table reservation (
    id          uuid        not null,
    sale_id     bigint      not null,
    buyer_id    bigint      not null,
    request_key text        not null,
    status      text        not null default 'confirmed', -- or 'refused'
    reason      text,                                     -- why it was refused
    earlier     uuid,                                     -- the reservation that the buyer had already
    changed_at  timestamptz not null default clock_timestamp()
);
create index reservation_by_id on reservation (id);
create index reservation_by_buyer on reservation (buyer_id, sale_id);
create index reservation_by_key on reservation (request_key, sale_id);

-- What became of the orders, in the order in which it is told: a log of events. Who was told what is not kept, as a client may come back and ask
-- again. So nothing here goes by itself: whoever runs this prunes it, once nobody will ask for the orders of a sale any more.
create table outbox (
    number         bigint generated always as identity primary key,
    reservation_id uuid   not null
);
create index outbox_by_reservation on outbox (reservation_id);

-- How far each partition has been decided: the next offset to decide. It tells batches apart; whether an order was decided, its row tells.
create table partition_offset (
    topic       text    not null,
    partition   integer not null,
    next_offset bigint  not null,
    primary key (topic, partition)
);
-- ANCHOR_END: tables

-- The secret that ids are made with. It is the database's own: whoever has these rows has it, and all instances have the same.
create table id_key (
    key bytea not null
);
insert into id_key (key)
    select uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid());

-- What the theatre and the judge read, the same two views in every level; here with why a buyer was refused.
create view sale_now as
    select id as sale_id, name, capacity, stock
      from sale;

create view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at, reason, earlier
      from reservation;
