-- What the database makes of the batches of single_writer.rs alone: nothing is taken from Kafka, nothing is decided, nobody is told.
-- A client writes one batch after another.
\set first :buyer + :client_id * 100000000 + random(0, 40000) * 2000
begin;
select id, stock from sale where id = any(array[:sale::bigint]);
select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
  from generate_series(:first::bigint, :first::bigint + 1999) as buyer
  join reservation r on r.sale_id = :sale and r.buyer_id = buyer
 union
select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
  from generate_series(:first::bigint, :first::bigint + 1999) as buyer
  join reservation r on r.sale_id = :sale and r.request_key = buyer::text;
update partition_offset set next_offset = next_offset + 2000 where topic = 'orders' and partition = 0;
update sale set stock = stock - 0 where id = :sale;
with decided as (
    insert into reservation (id, sale_id, buyer_id, request_key, status, reason)
        select gen_random_uuid(), :sale, buyer, buyer::text, 'refused', 'sold-out'
          from generate_series(:first::bigint, :first::bigint + 1999) as buyer
    returning id
)
insert into outbox (reservation_id) select id from decided;
commit;
