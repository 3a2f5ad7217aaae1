-- The schema `bare`: tables, and no constraint that could do the strategy's work.
--
-- No unique key on (sale_id, buyer_id), no check on stock, and no foreign key, whose check on every insert would lock the sale's row.
-- Only the strategy keeps a sale correct on these tables.

create table sale (
    id       bigint primary key,
    name     text   not null,
    capacity bigint not null,
    stock    bigint not null
);

create table reservation (
    id          uuid        primary key,
    sale_id     bigint      not null,
    buyer_id    bigint      not null,
    request_key text        not null,
    status      text        not null default 'confirmed',
    changed_at  timestamptz not null default clock_timestamp()
);

-- Not unique: these indexes only speed up queries. `sale_id` is last: a plan cached while the table was empty could otherwise use it
-- alone and scan the whole sale.
create index reservation_by_buyer on reservation (buyer_id, sale_id);
create index reservation_by_key on reservation (request_key, sale_id);

-- Views that the server and the judge read; the same in every level.
create view sale_now as
    select id as sale_id, name, capacity, stock
      from sale;

create view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at
      from reservation;
