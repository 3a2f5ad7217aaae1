-- The schema `guarded`: constraints enforce the rules of a sale, even if the code does not.

create table sale (
    id       bigint primary key,
    name     text   not null,
    capacity bigint not null check (capacity > 0),
    stock    bigint not null,
    constraint stock_is_never_negative check (stock between 0 and capacity)
);

create table reservation (
    id          uuid        primary key,
    sale_id     bigint      not null references sale,
    buyer_id    bigint      not null,
    request_key text        not null,
    status      text        not null default 'confirmed',
    changed_at  timestamptz not null default clock_timestamp(),
    constraint one_reservation_for_a_buyer unique (sale_id, buyer_id),
    constraint one_reservation_for_a_key unique (sale_id, request_key)
);

-- Views that the server and the judge read; the same in every level.
create view sale_now as
    select id as sale_id, name, capacity, stock
      from sale;

create view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at
      from reservation;
