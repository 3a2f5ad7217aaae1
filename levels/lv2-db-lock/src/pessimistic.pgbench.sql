-- The statements of pessimistic.rs, in the same order and with a round trip each: what the database itself makes of them.
-- `buyer` counts up from an offset of its own in every client, so no buyer comes twice.
\set buyer :buyer + 1
\set who :client_id * 1000000000 + :buyer

begin;

select stock
  from sale
 where id = :sale
   for update
\gset

select id, buyer_id, request_key
  from reservation
 where sale_id = :sale
   and (buyer_id = :who or request_key = :who)
 order by request_key = :who desc
 limit 1;

\set left :stock - 1
update sale
   set stock = :left
 where id = :sale;

-- pgbench has no UUIDs: this one grows with the buyers, as a version 7 does with the time.
insert into reservation (id, sale_id, buyer_id, request_key)
values (lpad(:who::text, 32, '0')::uuid, :sale, :who, :who);

commit;
