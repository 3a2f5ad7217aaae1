-- The statements of single_writer.rs for one batch: the throughput of the database alone. One
-- client, as a sale has one writer.
-- `first` is the offset at which the next batch begins, and the buyers are numbered with it: no
-- buyer orders twice.
-- pgbench has no HMAC: an id is the digest of the buyer's number, spread over the index as the ids
-- of the strategy are.
\set batch 2000
\set next :first + :batch

\if :first = 0
insert into partition_offset (topic, partition, next_offset)
values ('orders', 0, :first)
    on conflict do nothing;
\endif
select next_offset
  from partition_offset
 where topic = 'orders'
   and partition = 0;

begin;
select id, stock
  from sale
 where id = :sale;
select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
  from generate_series(:first + 1, :next::bigint) as o (buyer_id)
  join reservation r on r.sale_id = :sale and r.buyer_id = o.buyer_id
 union
select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
  from generate_series(:first + 1, :next::bigint) as o (buyer_id)
  join reservation r on r.sale_id = :sale and r.request_key = o.buyer_id::text;
update partition_offset
   set next_offset = :next
 where topic = 'orders'
   and partition = 0
   and next_offset = :first;
update sale
   set stock = stock - :batch
 where id = :sale;
insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
    select md5(buyer_id::text)::uuid, :sale, buyer_id, buyer_id::text, 'confirmed', null, null
      from generate_series(:first + 1, :next::bigint) as buyer_id;
insert into outbox (reservation_id)
    select md5(buyer_id::text)::uuid
      from generate_series(:first + 1, :next::bigint) as buyer_id;
select pg_notify('decided', string_agg(md5(buyer_id::text)::uuid::text, ','))
  from generate_series(:first + 1, :next::bigint) as buyer_id
 group by buyer_id / 200;
commit;
\set first :next
