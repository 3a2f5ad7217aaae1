-- The schema `bare`: tables, and no constraint that could do the strategy's work.
--
-- Not even the id of a reservation is unique: the strategy has to decide each order once.

create table sale (
    id       bigint primary key,
    name     text   not null,
    capacity bigint not null,
    stock    bigint not null
);

-- ANCHOR: tables
-- The decisions, one row for each order. A refused order has a row, too: its buyer asks for the result.
create table reservation (
    id          uuid        not null,
    sale_id     bigint      not null,
    buyer_id    bigint      not null,
    request_key text        not null,
    status      text        not null default 'confirmed', -- or 'refused'
    reason      text,                                     -- why it was refused
    earlier     uuid,                                     -- the reservation that the buyer already had
    changed_at  timestamptz not null default clock_timestamp()
);
create index reservation_by_id on reservation (id);
create index reservation_by_buyer on reservation (buyer_id, sale_id);
create index reservation_by_key on reservation (request_key, sale_id);

-- The results of orders: a log of events, in the order in which they are sent. Deliveries to buyers are not recorded: a client may
-- reconnect and ask again. Nothing is deleted automatically. An operator may delete the events of a sale once nobody asks for its orders.
create table outbox (
    number         bigint generated always as identity primary key,
    reservation_id uuid   not null
);
create index outbox_by_reservation on outbox (reservation_id);

-- The next offset of each partition to decide. It identifies a batch that is too late. Whether an order is decided, its row shows.
create table partition_offset (
    topic       text    not null,
    partition   integer not null,
    next_offset bigint  not null,
    primary key (topic, partition)
);
-- ANCHOR_END: tables

-- The secret key from which reservation ids are derived. All instances share it, because they share this database.
create table id_key (
    key bytea not null
);
insert into id_key (key)
    select uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid());

-- Views that the server and the judge read; the same in every level, here with the reason of a refusal.
create view sale_now as
    select id as sale_id, name, capacity, stock
      from sale;

create view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at, reason, earlier
      from reservation;
