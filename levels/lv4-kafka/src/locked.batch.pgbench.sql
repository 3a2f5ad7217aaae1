-- The statements of locked.rs for one order: the throughput of the database alone, without a lock.
-- One client, as the lock has one holder.
-- The buyer's number grows with every order: no buyer orders twice.
-- pgbench has no HMAC: an id is the digest of the buyer's number, spread over the index as the ids
-- of the strategy are.
\set batch 1
\set first :first + 1

begin;
select exists (select from reservation where id = md5(:first::text)::uuid);
select stock
  from sale
 where id = :sale;
select id, buyer_id = :first
  from reservation
 where sale_id = :sale
   and (buyer_id = :first and status = 'confirmed' or buyer_id <> :first and request_key = :first::text)
 order by request_key = :first::text desc
 limit 1;
update sale
   set stock = stock - 1
 where id = :sale;
insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
values (md5(:first::text)::uuid, :sale, :first, :first, 'confirmed', null, null);
insert into outbox (reservation_id) values (md5(:first::text)::uuid);
select pg_notify('decided', md5(:first::text)::uuid::text);
commit;
