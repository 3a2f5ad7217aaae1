create table sale (
    id       bigint primary key,
    name     text   not null,
    capacity bigint not null,
    stock    bigint not null
);

create table reservation (
    id          uuid   primary key,
    sale_id     bigint not null,
    buyer_id    bigint not null,
    request_key text   not null,
    status      text   not null
);

create view sale_now as
select id as sale_id, name, capacity, stock
  from sale;

create view reservation_now as
select id, sale_id, buyer_id, request_key, status, now() as changed_at
  from reservation;
