-- The schema `bare`: tables, and no constraint that could keep a guarantee in a strategy's place.
--
-- No unique key on (sale_id, buyer_id), no check on stock, and no foreign key either: an insert would lock the sale's row to honour it.
-- What keeps a sale right on these tables is the strategy alone.

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

-- Not unique: they only make the look-ups quick. The sale comes last: a plan that was made while the table was empty would else be
-- content with it, and read through all reservations of the sale.
create index reservation_by_buyer on reservation (buyer_id, sale_id);
create index reservation_by_key on reservation (request_key, sale_id);

-- What the theatre and the judge read, the same two views in every level.
create view sale_now as
    select id as sale_id, name, capacity, stock
      from sale;

create view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at
      from reservation;
